// Every operator of the native library. Schemas are in Python (quest_compile/ops), except those of
// the ops that exist in this library only.
#include "counters.h"
#include "cpu/dispatch.h"
#include "cpu/ops.h"
#ifdef QUEST_HAVE_CUDA
#include "cuda/ops.h"
#endif

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
  m.impl("update_page_summary", TORCH_BOX(&quest::update_page_summary));
  m.impl("score_pages", TORCH_BOX(&quest::score_pages));
  m.impl("select_pages", TORCH_BOX(&quest::select_pages));
  m.impl("attend_pages", TORCH_BOX(&quest::attend_pages));
  m.impl("sparse_decode", TORCH_BOX(&quest::sparse_decode));
  m.impl("sparse_decode_step", TORCH_BOX(&quest::sparse_decode_step));
  m.impl("dense_decode", TORCH_BOX(&quest::dense_decode));
  m.impl("share_mask", TORCH_BOX(&quest::share_mask));
}

#ifdef QUEST_HAVE_CUDA
STABLE_TORCH_LIBRARY_IMPL(quest, CUDA, m) {
  m.impl("update_page_summary", TORCH_BOX(&quest::cuda::update_page_summary));
  m.impl("score_pages", TORCH_BOX(&quest::cuda::score_pages));
  m.impl("select_pages", TORCH_BOX(&quest::cuda::select_pages));
  m.impl("attend_pages", TORCH_BOX(&quest::cuda::attend_pages));
  m.impl("sparse_decode", TORCH_BOX(&quest::cuda::sparse_decode));
  m.impl("sparse_decode_step", TORCH_BOX(&quest::cuda::sparse_decode_step));
  m.impl("dense_decode", TORCH_BOX(&quest::cuda::dense_decode));
}
#endif
