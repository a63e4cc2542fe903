#include "cuda/launch.h"
#include "cuda/select.h"

namespace quest {
namespace cuda {
namespace {

constexpr int64_t kSelectSharedBytes = kMaxSharedOrder * 4 + sizeof(SelectMemory) + 64;

// The operator select_pages. Grid: (batch row, select head).
QUEST_KERNEL(kThreads, 1)
select_kernel(QUEST_PARAM SelectCall p) {
  SharedMemory memory;
  SelectMemory& select = *memory.take<SelectMemory>(1);
  int32_t* copy = memory.take<int32_t>(kMaxSharedOrder);
  const int row = cta_x() / p.num_select_heads, head = cta_x() % p.num_select_heads;
  const int num_heads = p.rows.num_q_heads / p.num_select_heads;
  const int len = row_len(p.rows, row, select.values);
  const int num_pages = (len + p.choice.page_size - 1) / p.choice.page_size;
  const float* scores = p.scores + row * p.batch_stride + head * p.head_stride;
  int32_t* order = p.order + static_cast<int64_t>(cta_x()) * p.num_pages;
  constexpr int kLanes = 8;
  const int lane = lane_index() % kLanes;
  for (int first = 0; first < num_pages; first += kThreads / kLanes) {
    const int page = first + thread_index() / kLanes;
    const bool live = is_live(p.rows, row, head * num_heads, num_heads, page, p.choice.page_size,
                              len, lane, kLanes);
    if (page < num_pages && lane == 0) order[page] = order_of(scores[page], live);
  }
  sync_cta();
  int32_t* page_indices = p.page_indices + static_cast<int64_t>(cta_x()) * p.choice.page_budget;
  PageSelector selector(p.choice, copy_order(order, num_pages, copy), num_pages, select);
  const int count = selector.select(page_indices);
  for (int i = count + thread_index(); i < p.choice.page_budget; i += kThreads) {
    page_indices[i] = -1;
  }
}

}  // namespace

int launch_select(const SelectCall& call, void* stream) {
  const int64_t grid = static_cast<int64_t>(call.rows.batch) * call.num_select_heads;
  return launch(select_kernel, grid, 1, kThreads, kSelectSharedBytes, call, stream);
}

}  // namespace cuda
}  // namespace quest
