#include <algorithm>

#include "cpu/ops.h"
#include "cpu/selection.h"
#include "cpu/tasks.h"

namespace quest {

Tensor select_pages(Tensor scores, Tensor seq_lens, std::optional<Tensor> attn_mask,
                    int64_t page_budget, int64_t page_size, int64_t num_sink_pages,
                    int64_t num_recent_pages) {
  CHECK_DTYPE(scores, ScalarType::Float);
  CHECK_DIM(scores, 3, "[batch, num_select_heads, num_pages]");
  check_page_size(page_size);
  QUEST_CHECK(page_budget >= 1 && page_budget < INT32_MAX, "page_budget: expected at least 1, got ",
              page_budget);
  check_page_budget(page_budget, num_sink_pages, num_recent_pages);
  const int64_t batch = scores.size(0), num_heads = scores.size(1), num_pages = scores.size(2);
  QUEST_CHECK(num_heads >= 1, "scores: expected at least 1 head, got ", num_heads);
  check_seq_lens(seq_lens, scores, batch);
  Scratch& scratch = call_scratch();
  scratch.reset();
  int64_t* lengths = scratch.take<int64_t>(batch);
  read_seq_lens(seq_lens, batch, num_pages * page_size, lengths);
  Mask mask = {nullptr, 0, 0, 0, 0};
  int64_t group_size = 1;
  if (attn_mask) {
    CHECK_DIM(*attn_mask, 4, "broadcastable to [batch, num_q_heads, 1, max_seq_len]");
    const int64_t mask_heads = attn_mask->size(1), mask_len = attn_mask->size(3);
    QUEST_CHECK(mask_heads == 1 || mask_heads % num_heads == 0,
                "attn_mask: expected 1 head or a multiple of ", num_heads, ", got ", mask_heads);
    QUEST_CHECK(mask_len == 1 || ceil_div(mask_len, page_size) == num_pages,
                "attn_mask: expected a last dimension of ", num_pages, " pages, got ", mask_len,
                " positions");
    mask = check_mask(attn_mask, scores, batch, mask_heads, 1, mask_len);
    group_size = std::max<int64_t>(1, mask_heads / num_heads);
    for (int64_t row = 0; row < batch && mask_len > 1; ++row) {
      QUEST_CHECK(lengths[row] <= mask_len, "seq_lens: expected 1 <= length <= ", mask_len,
                  ", got ", lengths[row], " in row ", row);
    }
  }

  const Choice choice = {page_budget, page_size, num_sink_pages, num_recent_pages};
  const Tensor rows = scores.stride(2) == 1 ? scores : torch::stable::contiguous(scores);
  const float* data = static_cast<const float*>(rows.const_data_ptr());
  const int64_t batch_stride = rows.stride(0), head_stride = rows.stride(1);
  Tensor page_indices = new_tensor(scores, {batch, num_heads, page_budget}, ScalarType::Int);
  int32_t* out = static_cast<int32_t*>(page_indices.mutable_data_ptr());
  const int64_t bytes = batch * num_heads * num_pages * static_cast<int64_t>(sizeof(float));
  run_tasks(batch * num_heads, bytes, [&](int64_t i) {
    const int64_t row = i / num_heads, head = i % num_heads;
    Scratch& mine = task_scratch();
    mine.reset();
    int32_t* chosen = out + i * page_budget;
    const float* row_scores = data + row * batch_stride + head * head_stride;
    uint8_t* live = nullptr;
    if (mask.data) {
      live = mine.take<uint8_t>(ceil_div(lengths[row], page_size));
      find_live_pages(mask, 1, row, head * group_size, group_size, page_size, lengths[row], live);
    }
    const int64_t count = choose_pages(choice, lengths[row], row_scores, live, chosen, mine);
    std::fill(chosen + count, chosen + page_budget, -1);
  });
  return page_indices;
}

}  // namespace quest
