#include "cuda/launch.h"
#include "cuda/select.h"

namespace quest {
namespace cuda {
namespace {

constexpr int64_t kSelectSharedBytes =
    kMaxSharedOrder * 4 + sizeof(SelectMemory) + sizeof(WeightMemory) + 64;

// The operator select_pages. Grid: (batch row, select head).
QUEST_KERNEL(kThreads, 1)
select_kernel(QUEST_PARAM SelectCall p) {
  SharedMemory memory;
  SelectMemory& select = *memory.take<SelectMemory>(1);
  WeightMemory& weights = *memory.take<WeightMemory>(1);
  int32_t* copy = memory.take<int32_t>(kMaxSharedOrder);
  const int row = cta_x() / p.num_select_heads, head = cta_x() % p.num_select_heads;
  const int num_heads = p.rows.num_q_heads / p.num_select_heads;
  const int len = row_len(p.rows, row, select.values);
  const int page_size = static_cast<int>(p.selection.page_size);
  const int num_pages = row_pages(p.selection, len);
  const float* scores = p.scores + row * p.batch_stride + head * p.head_stride;
  int32_t* order = p.order + static_cast<int64_t>(cta_x()) * p.num_pages;
  order_pages(p.rows, row, head * num_heads, num_heads, page_size, len, 0, num_pages, scores,
              order);
  sync_cta();
  int32_t* page_indices = p.page_indices + static_cast<int64_t>(cta_x()) * p.selection.page_budget;
  PageSelector selector(p.selection, copy_order(order, num_pages, {copy, kMaxSharedOrder}),
                        num_pages, select, weights);
  const int count = selector.select(page_indices);
  for (int i = count + thread_index(); i < p.selection.page_budget; i += kThreads) {
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
