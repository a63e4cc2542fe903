#include <algorithm>

#include "cpu/ops.h"
#include "cpu/selection.h"
#include "cpu/tasks.h"

namespace quest {

Tensor select_pages(Tensor scores, Tensor seq_lens, std::optional<Tensor> attn_mask,
                    Selection selection) {
  const SelectArguments arguments = check_select(scores, seq_lens, attn_mask, selection);
  const int64_t page_budget = selection.page_budget, page_size = selection.page_size;
  const int64_t batch = arguments.batch, num_heads = arguments.num_heads;
  const int64_t num_pages = arguments.num_pages, group_size = arguments.group_size;
  const Mask& mask = arguments.mask;
  Scratch& scratch = call_scratch();
  scratch.reset();
  int64_t* lengths = scratch.take<int64_t>(batch);
  read_seq_lens(seq_lens, batch, arguments.max_seq_len, lengths);

  Tensor page_indices = new_tensor(scores, {batch, num_heads, page_budget}, ScalarType::Int);
  int32_t* out = static_cast<int32_t*>(page_indices.mutable_data_ptr());
  const int64_t bytes = batch * num_heads * num_pages * static_cast<int64_t>(sizeof(float));
  run_tasks(batch * num_heads, bytes, [&](int64_t i) {
    const int64_t row = i / num_heads, head = i % num_heads;
    Scratch& mine = task_scratch();
    mine.reset();
    int32_t* chosen = out + i * page_budget;
    const float* row_scores =
        arguments.scores + row * arguments.batch_stride + head * arguments.head_stride;
    uint8_t* live = nullptr;
    if (mask.data) {
      live = mine.take<uint8_t>(ceil_div(lengths[row], page_size));
      find_live_pages(mask, 1, row, head * group_size, group_size, page_size, lengths[row], live);
    }
    const int64_t count = choose_pages(selection, lengths[row], row_scores, live, chosen, mine);
    std::fill(chosen + count, chosen + page_budget, -1);
  });
  return page_indices;
}

}  // namespace quest
