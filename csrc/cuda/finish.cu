#include "cuda/finish.h"
#include "cuda/launch.h"

namespace quest {
namespace cuda {
namespace {

// Behind kernel 1 where nothing is attended. Grid: (batch row, KV head).
QUEST_KERNEL(kThreads, 2)
finish_kernel(QUEST_PARAM FinishCall p) {
  SharedMemory memory;
  WarpValues& values = *memory.take<WarpValues>(1);
  const int num_kv_heads = p.summaries.num_kv_heads;
  finish_head(p.summaries, p.update, cta_x() / num_kv_heads, cta_x() % num_kv_heads, values);
  if (cta_x() == 0) finish_update(p, values);
}

}  // namespace

int launch_finish(const FinishCall& call, void* stream) {
  const int64_t grid = static_cast<int64_t>(call.summaries.batch) * call.summaries.num_kv_heads;
  return launch(finish_kernel, grid, 1, kThreads, sizeof(WarpValues) + 16, call, stream);
}

}  // namespace cuda
}  // namespace quest
