// Kernel 1: page summaries and scores.
#pragma once

#include "cuda/finish.h"
#include "cuda/score_share.h"

namespace quest {
namespace cuda {

// Part `part` of the summaries and scores of a (row, KV head).
template <class Scorer>
QUEST_DEVICE void score_part(const ScoreCall& p, const RowPages& pages, int index, int part,
                             SharedMemory memory, WarpValues& values) {
  const Summaries& s = p.summaries;
  const int row = index / s.num_kv_heads, kv_head = index % s.num_kv_heads;
  const bool is_first_query = row % p.rows.q_len == 0;
  const bool reports = pages.updates && is_first_query && part == 0;
  if (part * pages.share >= pages.num_pages && !reports) return;
  ShareScorer<Scorer> scorer(p, pages, row, kv_head, part, memory, values);
  if (p.order) {
    scorer.set_order(p.order + score_index(p, row, kv_head, 0, scorer.first_page()), s.num_pages);
  }
  scorer.prepare(reports);
  if (pages.reuses) scorer.order_stored();
  const int64_t head = static_cast<int64_t>(row / p.rows.q_len) * s.num_kv_heads + kv_head;
  const int64_t start = pages.span.start;
  bool is_stale = false;
  const auto place_of = [&](int64_t page) -> char* {
    if (!is_first_query) return nullptr;
    const int sample = is_stale ? sample_index(pages.span, start, page) : kNumSamples;
    return sample < kNumSamples ? late_row(s, p.update, head, sample) : scorer.row_of_page(page);
  };
  // At first as if nobody else had written the cache: to find that out takes as long.
#pragma unroll 1
  for (;;) {
    const bool differs = scorer.run(place_of);
    if (is_stale) return;
    is_stale = any_in_cta(differs);
    if (reports && thread_index() == 0) {
      p.update.stale_starts[head] = is_stale ? static_cast<int32_t>(start) : 0;
    }
    if (!is_stale) return;
    // Other CTAs may still look at the samples and at the scales: the next kernel writes those.
    scorer.start_again();
    if (reports) scorer.store_scale(p.update.late_scales + head * s.rows.scale_size);
  }
}

// Where stored scores were to be taken: whether all other CTAs are done and a foreign write was
// found, in any KV head. Then this CTA has to score them all.
QUEST_DEVICE bool has_to_score(const ScoreCall& p) {
  const Update& u = p.update;
  const int64_t num_ctas =
      static_cast<int64_t>(p.summaries.batch) * p.summaries.num_kv_heads * p.num_parts;
  fence_device();
  sync_cta();
  const bool is_last = any_in_cta(thread_index() == 0 && is_last_at_state(u, num_ctas));
  if (!is_last) return false;
  fence_device();
  if (thread_index() == 0) *u.num_sealed = without_arrivals(*u.num_sealed);
  return any_stale(p.summaries, u);
}

// Of all pages at once, whose summaries are up to date.
QUEST_DEVICE void set_only_scores(RowPages& pages, int64_t num_pages) {
  pages.updates = pages.reuses = false;
  pages.has_scores = true;
  pages.span.start = pages.span.num_sealed;
  pages.num_pages = pages.share = num_pages;
}

// Kernel 1 (calls.h). Grid: (row, KV head), part. kKeepsScores: p.kept is used.
template <class Scorer, bool kKeepsScores>
QUEST_KERNEL(kThreads, 1)
score_kernel(QUEST_PARAM ScoreCall p) {
  let_next_begin();
  SharedMemory memory;
  WarpValues& values = *memory.take<WarpValues>(1);
  const int num_kv_heads = p.summaries.num_kv_heads;
  if (p.arrivals && cta_y() == 0) {
    const int64_t first = static_cast<int64_t>(cta_x()) * p.rows.group_size;
#pragma unroll 1
    for (int h = thread_index(); h < p.rows.group_size; h += kThreads) p.arrivals[first + h] = 0;
  }
  const RowPages found = find_pages<kKeepsScores>(p, cta_x() / num_kv_heads, values);
  if (!kKeepsScores) {
    score_part<Scorer>(p, found, cta_x(), cta_y(), memory, values);
    return;
  }
  // In shared memory, as there are few registers.
  RowPages& pages = *memory.take<RowPages>(1);
  if (thread_index() == 0) pages = found;
  sync_cta();
  int index = cta_x(), part = cta_y(), end = index + 1;
#pragma unroll 1
  for (;;) {
    score_part<Scorer>(p, pages, index, part, memory, values);
    if (pages.reuses) {
      if (!has_to_score(p)) return;
      if (thread_index() == 0) set_only_scores(pages, p.summaries.num_pages);
      sync_cta();
      index = -1;
      part = 0;
      end = p.summaries.batch * num_kv_heads;
    }
    if (++index == end) return;
    finish_head(p.summaries, p.update, index / num_kv_heads, index % num_kv_heads, values);
    sync_cta();
  }
}

}  // namespace cuda
}  // namespace quest
