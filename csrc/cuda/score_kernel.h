// Kernel 1: page summaries and scores.
#pragma once

#include "cuda/budget.h"
#include "cuda/finish.h"
#include "cuda/score.h"

namespace quest {
namespace cuda {

// What there is to do for a row, known to the device alone.
struct RowPages {
  bool updates;
  bool has_scores;
  Span span;
  int len;
  int num_pages;  // to summarise or to score
  int share;      // that every CTA gets: a multiple of 4
};

QUEST_DEVICE RowPages find_pages(const ScoreCall& p, int row, WarpValues& values) {
  const Summaries& s = p.summaries;
  RowPages pages = {};
  pages.updates = p.update.positions != nullptr;
  const int64_t seq_len = p.query.data ? given_len(p.rows, row / p.rows.q_len) : 0;
  if (pages.updates) {
    const State state = read_state(p.update);
    pages.span = read_positions(p.update, s, values);
    pages.span.start = read_start(state, s, pages.span);
  }
  pages.num_pages = pages.span.num_sealed;
  if (p.query.data) {
    pages.len = row_len(p.rows, row, seq_len, values);
    pages.has_scores = !row_fits(p.selection, pages.len);
  }
  if (pages.has_scores) {
    const int num_used = (pages.len + s.page_size - 1) / s.page_size;
    pages.num_pages = maximum(pages.num_pages, p.scores ? s.num_pages : num_used);
  }
  pages.share = ((pages.num_pages + p.num_parts - 1) / p.num_parts + 3) / 4 * 4;
  return pages;
}

// Kernel 1 (calls.h). Grid: (row, KV head), part.
template <class Kind>
QUEST_KERNEL(kThreads, 1)
score_kernel(QUEST_PARAM ScoreCall p) {
  let_next_begin();
  SharedMemory memory;
  WarpValues& values = *memory.take<WarpValues>(1);
  const Summaries& s = p.summaries;
  const int row = cta_x() / s.num_kv_heads, kv_head = cta_x() % s.num_kv_heads;
  const int part = cta_y();
  if (p.arrivals && part == 0) {
    const int64_t first = static_cast<int64_t>(cta_x()) * p.rows.group_size;
#pragma unroll 1
    for (int h = thread_index(); h < p.rows.group_size; h += kThreads) p.arrivals[first + h] = 0;
  }
  const RowPages pages = find_pages(p, row, values);
  const int batch_row = row / p.rows.q_len, start = pages.span.start;
  const bool is_first_query = row % p.rows.q_len == 0;
  const bool reports = pages.updates && is_first_query && part == 0;
  PageRange range = {};
  range.first = part * pages.share;
  if (range.first >= pages.num_pages && !reports) return;
  range.last = minimum(range.first + pages.share, pages.num_pages);
  range.has_scores = pages.has_scores;
  range.num_complete = pages.has_scores ? pages.len / s.page_size : 0;
  range.start = start;
  range.num_sealed = pages.span.num_sealed;
  range.len = pages.len;

  PageScorer<Kind> scorer(p, row, kv_head, memory);
  const int64_t head = static_cast<int64_t>(batch_row) * s.num_kv_heads + kv_head;
  bool is_stale = false;
  const auto place_of = [&](int page) -> char* {
    if (!is_first_query) return nullptr;
    const int sample = is_stale ? sample_index(pages.span, start, page) : kNumSamples;
    return sample < kNumSamples ? late_row(s, p.update, head, sample)
                                : row_of(s, batch_row, kv_head, page);
  };
  // Of the pages that keep their summaries, if the state says that there are any.
  const bool looks = pages.updates && start > 0 && warp_index() < kNumSamples;
  int sample = looks ? sample_of(pages.span, start, warp_index()) : -1;
  // At first as if nobody else had written the cache: to find that out takes as long.
#pragma unroll 1
  for (;;) {
    const bool differs = scorer.run(range, place_of, sample, !is_stale);
    if (is_stale) return;
    is_stale = any_in_cta(differs);
    if (reports && thread_index() == 0) p.update.stale_starts[head] = is_stale ? start : 0;
    if (!is_stale) return;
    // Other CTAs may still look at the samples: the next kernel writes those.
    range.start = 0;
    sample = -1;
  }
}

}  // namespace cuda
}  // namespace quest
