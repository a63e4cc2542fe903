#include "cuda/ops.h"
#include "cuda/plan.h"

namespace quest {
namespace cuda {

Tensor score_pages(Tensor query, Tensor page_summary, Tensor seq_lens,
                   std::optional<Tensor> channel_scale, int64_t page_size,
                   StringHandle group_reduce, StringHandle summary, int64_t sketch_bits,
                   std::optional<Tensor> attn_mask, std::optional<double> scale) {
  const SummaryFormat format = check_summary_format(summary, sketch_bits, page_size);
  const ScoreArguments arguments =
      check_score(query, page_summary, seq_lens, channel_scale, check_group_reduce(group_reduce),
                  format, attn_mask, scale);
  const int64_t per_group = arguments.group_reduce == GroupReduce::kNone ? arguments.group_size : 1;
  Tensor scores =
      new_tensor(query, {arguments.batch, arguments.num_kv_heads * per_group, arguments.num_pages},
                 ScalarType::Float);
  if (arguments.batch == 0 || arguments.num_pages == 0) return scores;
  const OnDevice on(query);
  ScoreCall call = {};
  call.summaries = make_summaries(arguments.page_summary, arguments.dtype, page_size,
                                  arguments.num_pages, arguments.head_dim, arguments.batch);
  set_lens(call.rows, seq_lens);
  call.rows.batch = static_cast<int32_t>(arguments.batch);
  call.rows.q_len = 1;
  call.rows.group_size = static_cast<int32_t>(arguments.group_size);
  call.rows.num_kv_heads = static_cast<int32_t>(arguments.num_kv_heads);
  call.rows.num_q_heads = call.rows.num_kv_heads * call.rows.group_size;
  call.rows.max_seq_len = arguments.max_seq_len;
  call.rows.mask = arguments.mask;
  call.choice.page_size = static_cast<int32_t>(page_size);  // and no budget: all are scored
  call.choice.budget_fraction = 1;
  call.group_reduce = arguments.group_reduce;
  call.query = arguments.query;
  call.scale = arguments.scale;
  call.scores = static_cast<float*>(scores.mutable_data_ptr());
  plan_score(call, on.device());
  check_launch(launch_score(call, on.stream()), "score_pages");
  return scores;
}

}  // namespace cuda
}  // namespace quest
