#include "cuda/launch.h"
#include "cuda/shares.h"

namespace quest {
namespace cuda {
namespace {

// Behind kernel 1 where scores are wanted. Grid: (row, KV head).
QUEST_KERNEL(kThreads, 2)
share_kernel(QUEST_PARAM ShareCall p) {
  SharedMemory memory;
  WarpValues& values = *memory.take<WarpValues>(1);
  const int group_size = p.rows.group_size;
  const int num_complete = row_len(p.rows, cta_x() / p.rows.num_kv_heads, values) / p.page_size;
  const int32_t* order = p.order + static_cast<int64_t>(cta_x()) * group_size * p.num_pages;
  float* scores = p.scores + static_cast<int64_t>(cta_x()) * p.num_pages;
  int32_t* found = reinterpret_cast<int32_t*>(scores);
  GroupShares(order, p.num_pages, group_size, num_complete, memory.take<HeadSums>(group_size))
      .find(num_complete, found);
#pragma unroll 1
  for (int page = thread_index(); page < p.num_pages; page += kThreads) {
    if (page >= num_complete || found[page] == kDeadOrder) scores[page] = -kInfinity;
  }
}

}  // namespace

int launch_shares(const ShareCall& call, void* stream) {
  const int64_t grid = static_cast<int64_t>(call.rows.batch) * call.rows.num_kv_heads;
  const int64_t bytes = sizeof(WarpValues) + call.rows.group_size * sizeof(HeadSums) + 16;
  return launch(share_kernel, grid, 1, kThreads, bytes, call, stream);
}

}  // namespace cuda
}  // namespace quest
