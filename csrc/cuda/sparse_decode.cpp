#include "counters.h"
#include "cuda/ops.h"
#include "cuda/plan.h"

namespace quest {
namespace cuda {
namespace {

// Kernel 1 and kernel 2. update nullptr: summaries are up to date.
Tensor decode(const SparseArguments& arguments, const UpdateArguments* update,
              const Tensor& seq_lens) {
  const Attention& a = arguments.attention;
  const Shape& shape = a.shape;
  const quest::Choice& choice = arguments.choice;
  const bool selects = !fits_budget(choice, shape.max_seq_len);
  count(selects ? Counter::kSparseCalls : Counter::kSparseCallsCovered, 1);
  if (update) count(Counter::kUpdateCalls, 1);
  Tensor out = new_output(a);
  if (shape.batch == 0) return out;
  const OnDevice on(a.query_owner);

  AttendCall attend = make_attend(a, seq_lens, out);
  attend.choice = make_choice(choice);
  const int64_t num_pages = ceil_div(shape.max_seq_len, choice.page_size);
  ScoreCall score = {};
  score.summaries = make_summaries(arguments.page_summary, a.dtype, choice.page_size, num_pages,
                                   shape.head_dim, shape.batch);
  score.rows = attend.rows;
  score.group_reduce = arguments.group_reduce;
  score.choice = attend.choice;
  score.scale = a.scale;
  if (update) {
    score.update = make_update(*update);
    attend.finish = {score.summaries, score.update};
  }
  if (selects) {
    const bool is_shared = arguments.group_reduce != GroupReduce::kNone;
    attend.attended = Attended::kSelected;
    attend.selects_per_group = static_cast<int32_t>(is_shared ? 1 : shape.group_size);
    attend.heads_per_select = static_cast<int32_t>(is_shared ? shape.group_size : 1);
    attend.num_pages = static_cast<int32_t>(num_pages);
    score.query = a.query;
  }
  const int64_t num_works = plan_attend(attend, on.device());
  Workspace workspace(a.query_owner);
  if (update) {
    take_scratch(score.update, score.summaries, workspace);
    attend.finish.update = score.update;
  }
  if (selects) {
    score.order = workspace.take<int32_t>(shape.num_rows() * shape.num_kv_heads *
                                          attend.selects_per_group * num_pages);
    attend.order = score.order;
  }
  const bool has_first = selects || update;
  if (has_first) attend.arrivals = workspace.take<int32_t>(shape.num_rows() * shape.num_q_heads);
  take_scratch(attend, num_works, workspace);
  if (has_first) {
    score.arrivals = attend.arrivals;
    plan_score(score, on.device());
    check_launch(launch_score(score, on.stream()), "sparse_decode (scores)");
    attend.is_next = on.device().lets_next_begin;
  } else if (attend.arrivals) {
    const int64_t bytes = num_works * static_cast<int64_t>(sizeof(int32_t));
    check_launch(clear(attend.arrivals, bytes, on.stream()), "sparse_decode");
  }
  check_launch(launch_attend(attend, num_works, on.stream()), "sparse_decode (attention)");
  return out;
}

}  // namespace

Tensor sparse_decode(Tensor query, Tensor key_cache, Tensor value_cache, Tensor page_summary,
                     Tensor seq_lens, std::optional<Tensor> attn_mask,
                     std::optional<Tensor> channel_scale, int64_t budget, int64_t page_size,
                     int64_t num_sink_pages, int64_t num_recent_pages, StringHandle group_reduce,
                     StringHandle summary, int64_t sketch_bits, std::optional<double> scale,
                     double budget_fraction, double top_p) {
  const SummaryFormat format = check_summary_format(summary, sketch_bits, page_size);
  const GroupReduce reduce = check_group_reduce(group_reduce);
  return decode(check_sparse(query, key_cache, value_cache, page_summary, seq_lens, attn_mask,
                             channel_scale, budget, num_sink_pages, num_recent_pages, reduce,
                             format, scale, budget_fraction, top_p),
                nullptr, seq_lens);
}

Tensor sparse_decode_step(Tensor query, Tensor key_cache, Tensor value_cache, Tensor cache_position,
                          Tensor page_summary, Tensor num_sealed, Tensor seq_lens,
                          std::optional<Tensor> attn_mask, std::optional<Tensor> channel_scale,
                          int64_t budget, int64_t page_size, int64_t num_sink_pages,
                          int64_t num_recent_pages, StringHandle group_reduce, StringHandle summary,
                          int64_t sketch_bits, std::optional<double> scale, double budget_fraction,
                          double top_p) {
  const SummaryFormat format = check_summary_format(summary, sketch_bits, page_size);
  const GroupReduce reduce = check_group_reduce(group_reduce);
  const SparseArguments arguments = check_sparse(
      query, key_cache, value_cache, page_summary, seq_lens, attn_mask, channel_scale, budget,
      num_sink_pages, num_recent_pages, reduce, format, scale, budget_fraction, top_p);
  const UpdateArguments update =
      check_update(key_cache, cache_position, page_summary, num_sealed, channel_scale, format);
  return decode(arguments, &update, seq_lens);
}

}  // namespace cuda
}  // namespace quest
