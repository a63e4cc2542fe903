#include "cuda/ops.h"
#include "cuda/plan.h"

namespace quest {
namespace cuda {

Tensor select_pages(Tensor scores, Tensor seq_lens, std::optional<Tensor> attn_mask,
                    int64_t page_budget, int64_t page_size, int64_t num_sink_pages,
                    int64_t num_recent_pages, double budget_fraction, double top_p,
                    double score_scale) {
  const SelectArguments arguments =
      check_select(scores, seq_lens, attn_mask,
                   {page_budget, page_size, num_sink_pages, num_recent_pages, budget_fraction,
                    top_p, log2_scale(score_scale)});
  Tensor page_indices =
      new_tensor(scores, {arguments.batch, arguments.num_heads, page_budget}, ScalarType::Int);
  if (arguments.batch == 0 || arguments.num_pages == 0) return page_indices;
  const OnDevice on(scores);
  Workspace workspace(scores);
  SelectCall call = {};
  set_lens(call.rows, seq_lens);
  call.rows.batch = static_cast<int32_t>(arguments.batch);
  call.rows.q_len = 1;
  call.rows.num_q_heads = static_cast<int32_t>(arguments.num_heads * arguments.group_size);
  call.rows.max_seq_len = arguments.max_seq_len;
  call.rows.mask = arguments.mask;
  call.choice = make_choice(arguments.choice);
  call.num_select_heads = static_cast<int32_t>(arguments.num_heads);
  call.num_pages = static_cast<int32_t>(arguments.num_pages);
  call.scores = arguments.scores;
  call.batch_stride = arguments.batch_stride;
  call.head_stride = arguments.head_stride;
  call.order = workspace.take<int32_t>(arguments.batch * arguments.num_heads * arguments.num_pages);
  call.page_indices = static_cast<int32_t*>(page_indices.mutable_data_ptr());
  check_launch(launch_select(call, on.stream()), "select_pages");
  return page_indices;
}

}  // namespace cuda
}  // namespace quest
