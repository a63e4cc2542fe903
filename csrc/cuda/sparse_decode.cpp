#include "counters.h"
#include "cuda/plan.h"
#include "operators.h"

namespace quest {
namespace cuda {
namespace {

// Kernel 1 and kernel 2. update nullptr: summaries are up to date.
Tensor decode(const SparseArguments& arguments, const UpdateArguments* update,
              const Tensor& seq_lens) {
  const auto& [a, page_summary, selection] = arguments;
  const Shape& shape = a.shape;
  const bool selects = !fits_budget(selection, shape.max_seq_len);
  count(selects ? Counter::kSparseCalls : Counter::kSparseCallsCovered, 1);
  if (update) count(Counter::kUpdateCalls, 1);
  Tensor out = new_output(a);
  if (shape.batch == 0) return out;
  const OnDevice on(a.query_owner);

  AttendCall attend = make_attend(a, seq_lens, out);
  attend.selection = selection;
  const int64_t num_pages = ceil_div(shape.max_seq_len, selection.page_size);
  ScoreCall score = {};
  score.summaries = make_summaries(page_summary, a.dtype, shape.batch, shape.num_kv_heads,
                                   num_pages, shape.head_dim);
  score.rows = attend.rows;
  score.group_reduce = selection.group_reduce;
  score.selection = selection;
  score.scale = score_scale(selection.group_reduce, page_summary.format.kind, a.scale);
  if (update) {
    score.update = make_update(*update);
    attend.finish = {score.summaries, score.update};
  }
  if (selects) {
    const bool is_shared = selection.group_reduce != GroupReduce::kNone;
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
    const int64_t num_groups = shape.num_rows() * shape.num_kv_heads;
    const int64_t per_group = selection.group_reduce == GroupReduce::kSum ? 1 : shape.group_size;
    score.order = workspace.take<int32_t>(num_groups * per_group * num_pages);
    attend.order = score.order;
    if (selection.group_reduce == GroupReduce::kSoftmax && num_pages > kMaxSharedOrder) {
      attend.shared_order = workspace.take<int32_t>(num_groups * num_pages);
    }
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
                     Tensor seq_lens, std::optional<Tensor> attn_mask, SparseSettings settings) {
  return decode(
      check_sparse(query, key_cache, value_cache, page_summary, seq_lens, attn_mask, settings),
      nullptr, seq_lens);
}

Tensor sparse_decode_step(Tensor query, Tensor key_cache, Tensor value_cache, Tensor cache_position,
                          Tensor page_summary, Tensor num_sealed, Tensor seq_lens,
                          std::optional<Tensor> attn_mask, SparseSettings settings) {
  const SparseArguments arguments =
      check_sparse(query, key_cache, value_cache, page_summary, seq_lens, attn_mask, settings);
  const UpdateArguments update =
      check_update(key_cache, cache_position, page_summary, num_sealed, settings.format);
  return decode(arguments, &update, seq_lens);
}

}  // namespace cuda
}  // namespace quest
