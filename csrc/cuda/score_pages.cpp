#include "cuda/plan.h"
#include "operators.h"

namespace quest {
namespace cuda {

Tensor score_pages(Tensor query, Tensor page_summary, Tensor seq_lens,
                   std::optional<Tensor> attn_mask, GroupReduce group_reduce,
                   std::optional<double> scale, SummaryFormat format) {
  const ScoreArguments s =
      check_score(query, page_summary, seq_lens, attn_mask, group_reduce, scale, format);
  const int64_t per_group = group_reduce == GroupReduce::kNone ? s.group_size : 1;
  Tensor scores =
      new_tensor(query, {s.batch, s.num_kv_heads * per_group, s.num_pages}, ScalarType::Float);
  if (s.batch == 0 || s.num_pages == 0) return scores;
  const OnDevice on(query);
  Workspace workspace(query);
  ScoreCall call = {};
  call.summaries =
      make_summaries(s.page_summary, s.dtype, s.batch, s.num_kv_heads, s.num_pages, s.head_dim);
  set_lens(call.rows, seq_lens);
  call.rows.batch = static_cast<int32_t>(s.batch);
  call.rows.q_len = 1;
  call.rows.group_size = static_cast<int32_t>(s.group_size);
  call.rows.num_kv_heads = static_cast<int32_t>(s.num_kv_heads);
  call.rows.num_q_heads = call.rows.num_kv_heads * call.rows.group_size;
  call.rows.max_seq_len = s.max_seq_len;
  call.rows.mask = s.mask;
  call.selection.page_size = format.page_size;  // and no budget: all are scored
  call.selection.budget_fraction = 1;
  call.group_reduce = group_reduce;
  call.query = s.query;
  call.scale = score_scale(group_reduce, format.kind, s.scale);
  float* out = static_cast<float*>(scores.mutable_data_ptr());
  if (group_reduce == GroupReduce::kSoftmax) {
    call.order = workspace.take<int32_t>(s.batch * s.num_kv_heads * s.group_size * s.num_pages);
  } else {
    call.scores = out;
  }
  plan_score(call, on.device());
  check_launch(launch_score(call, on.stream()), "score_pages");
  if (group_reduce == GroupReduce::kSoftmax) {
    const ShareCall shares = {call.rows, call.summaries.page_size, call.summaries.num_pages,
                              call.order, out};
    check_launch(launch_shares(shares, on.stream()), "score_pages");
  }
  return scores;
}

}  // namespace cuda
}  // namespace quest
