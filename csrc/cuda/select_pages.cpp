#include "cuda/plan.h"
#include "operators.h"

namespace quest {
namespace cuda {

Tensor select_pages(Tensor scores, Tensor seq_lens, std::optional<Tensor> attn_mask,
                    Selection selection) {
  const SelectArguments s = check_select(scores, seq_lens, attn_mask, selection);
  Tensor page_indices =
      new_tensor(scores, {s.batch, s.num_heads, selection.page_budget}, ScalarType::Int);
  if (s.batch == 0 || s.num_pages == 0) return page_indices;
  const OnDevice on(scores);
  Workspace workspace(scores);
  SelectCall call = {};
  set_lens(call.rows, seq_lens);
  call.rows.batch = static_cast<int32_t>(s.batch);
  call.rows.q_len = 1;
  call.rows.num_q_heads = static_cast<int32_t>(s.num_heads * s.group_size);
  call.rows.max_seq_len = s.max_seq_len;
  call.rows.mask = s.mask;
  call.selection = selection;
  call.num_select_heads = static_cast<int32_t>(s.num_heads);
  call.num_pages = static_cast<int32_t>(s.num_pages);
  call.scores = s.scores;
  call.batch_stride = s.batch_stride;
  call.head_stride = s.head_stride;
  call.order = workspace.take<int32_t>(s.batch * s.num_heads * s.num_pages);
  call.page_indices = static_cast<int32_t*>(page_indices.mutable_data_ptr());
  check_launch(launch_select(call, on.stream()), "select_pages");
  return page_indices;
}

}  // namespace cuda
}  // namespace quest
