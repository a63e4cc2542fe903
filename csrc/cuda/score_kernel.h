// Kernel 1: page summaries and scores.
#pragma once

#include "cuda/finish.h"
#include "cuda/score_share.h"

namespace quest {
namespace cuda {

// Kernel 1 (calls.h). Grid: (row, KV head), part.
template <class Scorer>
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
  const bool is_first_query = row % p.rows.q_len == 0;
  const bool reports = pages.updates && is_first_query && part == 0;
  if (part * pages.share >= pages.num_pages && !reports) return;
  ShareScorer<Scorer> scorer(p, pages, row, kv_head, part, memory, values);
  if (p.order) {
    scorer.set_order(p.order + score_index(p, row, kv_head, 0, scorer.first_page()), s.num_pages);
  }
  scorer.prepare(reports);
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

}  // namespace cuda
}  // namespace quest
