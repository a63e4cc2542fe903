// The CUDA operators on CPU tensors, run by the emulation: torch.ops.quest_emulated.
#include "boxing.h"
#include "cuda/emulation/emulation.h"

namespace quest {
namespace cuda {
namespace {

// Returns the number of launches since the last call.
int64_t configure(int64_t num_sms, int64_t shared_bytes, int64_t seed) {
  Settings& settings = emulation_settings();
  const int64_t num_launches = settings.num_launches;
  settings = {static_cast<int>(num_sms), shared_bytes, static_cast<unsigned>(seed), 0};
  return num_launches;
}

}  // namespace
}  // namespace cuda
}  // namespace quest

STABLE_TORCH_LIBRARY_FRAGMENT(quest_emulated, m) {
  m.def("configure(int num_sms, int shared_bytes, int seed) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(quest_emulated, CompositeExplicitAutograd, m) {
  m.impl("configure", TORCH_BOX(&quest::cuda::configure));
}

STABLE_TORCH_LIBRARY_IMPL(quest_emulated, CPU, m) { QUEST_OPERATORS(QUEST_REGISTER_CUDA) }
