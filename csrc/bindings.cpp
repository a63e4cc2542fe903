// Every operator of the native library. Schemas are in Python (quest_compile/ops), except those of
// the ops that exist in this library only.
#include "boxing.h"
#include "counters.h"
#include "cpu/dispatch.h"
#include "cpu/ops.h"

namespace quest {

std::string native_info() {
  std::string info = std::string("cpu:") + kernels().name;
#ifdef QUEST_HAVE_CUDA
  info += " cuda:" QUEST_CUDA_ARCHITECTURES;
#endif
  return info;
}

}  // namespace quest

STABLE_TORCH_LIBRARY_FRAGMENT(quest, m) {
  m.def("native_counters(bool reset) -> int[]");
  m.def("native_info() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(quest, CompositeExplicitAutograd, m) {
  m.impl("native_counters", TORCH_BOX(&quest::native_counters));
  m.impl("native_info", TORCH_BOX(&quest::native_info));
}

STABLE_TORCH_LIBRARY_IMPL(quest, CPU, m) {
  QUEST_OPERATORS(QUEST_REGISTER_CPU)
  QUEST_CPU_OPERATORS(QUEST_REGISTER_CPU)
  m.impl("share_mask", TORCH_BOX(&quest::share_mask));
}

#ifdef QUEST_HAVE_CUDA
STABLE_TORCH_LIBRARY_IMPL(quest, CUDA, m) { QUEST_OPERATORS(QUEST_REGISTER_CUDA) }
#endif
