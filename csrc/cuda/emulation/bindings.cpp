// The CUDA operators on CPU tensors, run by the emulation: torch.ops.quest_emulated.
#include "cuda/emulation/emulation.h"
#include "cuda/ops.h"

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

STABLE_TORCH_LIBRARY_IMPL(quest_emulated, CPU, m) {
  m.impl("update_page_summary", TORCH_BOX(&quest::cuda::update_page_summary));
  m.impl("score_pages", TORCH_BOX(&quest::cuda::score_pages));
  m.impl("select_pages", TORCH_BOX(&quest::cuda::select_pages));
  m.impl("attend_pages", TORCH_BOX(&quest::cuda::attend_pages));
  m.impl("sparse_decode", TORCH_BOX(&quest::cuda::sparse_decode));
  m.impl("sparse_decode_step", TORCH_BOX(&quest::cuda::sparse_decode_step));
  m.impl("dense_decode", TORCH_BOX(&quest::cuda::dense_decode));
}
