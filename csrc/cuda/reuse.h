// Steps that select by the page scores of an earlier one (quest_compile/ops/sparse_decode_step.py):
// which do, and what is written about them. All rows have the same length.
#pragma once

#include "cuda/budget.h"
#include "cuda/summary_state.h"

namespace quest {
namespace cuda {

// Whether a row that does not fit the budget has its scores from the step before, unless a foreign
// write is found. Of the state before this step.
QUEST_DEVICE bool may_reuse(const KeptScores& kept, const Rows& rows, const Summaries& s,
                            const Span& span) {
  const int64_t seq_len = given_len(rows, 0);
  return kept.scored_at[0] > 0 && kept.scored_at[1] == seq_len - 1 &&
         seq_len % kept.select_every != 0 && span.start == span.first / s.page_size;
}

// Whether kernel 1 has found a foreign write, in any (batch row, KV head); by a whole CTA.
QUEST_DEVICE bool any_stale(const Summaries& s, const Update& u) {
  const int num_heads = s.batch * s.num_kv_heads;
  bool is_stale = false;
#pragma unroll 1
  for (int i = thread_index(); i < num_heads; i += kThreads) {
    is_stale = is_stale || u.stale_starts[i] != 0;
  }
  return any_in_cta(is_stale);
}

// Behind kernel 1, before the state is written; by one whole CTA.
QUEST_DEVICE void finish_scores(const AttendCall& p, WarpValues& values) {
  const Summaries& s = p.finish.summaries;
  const Update& u = p.finish.update;
  Span span = read_positions(u, s, values);
  span.start = read_start(read_state(u), s, span);
  const int len = row_len(p.rows, 0, values);
  const bool keeps =
      p.attended == Attended::kSelected && p.rows.q_len == 1 && !fits_budget(p.choice, len);
  const bool is_stale = any_stale(s, u);
  if (thread_index() != 0) return;
  const bool reuses = keeps && !is_stale && may_reuse(p.kept, p.rows, s, span);
  const int64_t seq_len = given_len(p.rows, 0);
  if (!reuses) p.kept.scored_at[0] = keeps ? seq_len : -1;
  p.kept.scored_at[1] = seq_len;
}

}  // namespace cuda
}  // namespace quest
