// Kernel 1: page summaries and scores, whatever is kept of the pages.
#pragma once

#include "cuda/sketch_score.h"

namespace quest {
namespace cuda {

// Kernel 1 (calls.h). Grid: (row, KV head), part.
template <class Scorer>
QUEST_KERNEL(kThreads, 1)
score_kernel(QUEST_PARAM ScoreCall p) {
  SharedMemory memory;
  WarpValues& values = *memory.take<WarpValues>(1);
  float* channel_scale = memory.take<float>(Scorer::channel_floats(p.summaries.head_dim));
  const Summaries& s = p.summaries;
  const int row = cta_x() / s.num_kv_heads, kv_head = cta_x() % s.num_kv_heads, part = cta_y();
  const int batch_row = row / p.rows.q_len;
  const bool is_first_query = row % p.rows.q_len == 0;
  if (p.arrivals && part == 0) {
    const int64_t first = static_cast<int64_t>(cta_x()) * p.rows.group_size;
    for (int h = thread_index(); h < p.rows.group_size; h += kThreads) p.arrivals[first + h] = 0;
  }

  PageRange range = {};
  Span span = {0, 0, 0, 0};
  const bool updates = p.update.positions != nullptr;
  if (updates) {
    span = read_positions(p.update, s, values);
    range.start = read_start(p.update, s, span);
    range.num_sealed = span.num_sealed;
  }
  int64_t num_pages = span.num_sealed;
  if (p.query.data) {
    range.len = row_len(p.rows, row, values);
    range.has_scores = range.len > p.budget;
  }
  if (range.has_scores) {
    range.num_complete = range.len / s.page_size;
    const int64_t num_used = (range.len + s.page_size - 1) / s.page_size;
    num_pages = maximum<int64_t>(num_pages, p.scores ? s.num_pages : num_used);
  }
  // Every CTA gets as many of the pages that there are by now.
  const int64_t share = (num_pages + p.num_parts - 1) / p.num_parts;
  range.first = part * share;
  range.last = minimum(range.first + share, num_pages);
  const bool reports = updates && is_first_query && part == 0;
  if (range.first >= range.last && !reports) return;

  Scorer scorer(p, row, kv_head, memory);
  const int64_t num_scaled = floor_to_power_of_two(span.num_sealed);
  const int num_scales = static_cast<int>(s.rows.scale_size);
  const int64_t head = static_cast<int64_t>(batch_row) * s.num_kv_heads + kv_head;
  if (num_scales > 0) {
    range.channel_scale = channel_scale;
    float* stored = channel_scale_of(s, batch_row, kv_head);
    if (updates && range.start == 0 && num_scaled > 0) {
      scorer.scale_channels(num_scaled, channel_scale, values);
      for (int d = thread_index(); reports && d < num_scales; d += kThreads) {
        stored[d] = channel_scale[d];
      }
    } else {
      for (int d = thread_index(); d < num_scales; d += kThreads) channel_scale[d] = stored[d];
      scorer.complete_channels(channel_scale);
    }
  }

  if (range.has_scores) scorer.prepare(range.channel_scale);
  const int64_t start = range.start;
  bool is_stale = false;
  const auto place_of = [&](int64_t page) -> char* {
    if (!is_first_query) return nullptr;
    const int sample = is_stale ? sample_index(span, start, page) : kNumSamples;
    return sample < kNumSamples ? late_row(s, p.update, head, sample)
                                : row_of(s, batch_row, kv_head, page);
  };
  // At first as if nobody else had written the cache: to find that out takes as long.
#pragma unroll 1
  for (;;) {
    scorer.run(range, place_of);
    if (is_stale) return;
    bool differs = false;
    if (updates && start > 0 && warp_index() < kNumSamples) {
      differs = scorer.page_differs(sample_of(span, start, warp_index()), range.channel_scale);
    }
    is_stale = any_in_cta(differs);
    if (reports && thread_index() == 0) {
      p.update.stale_starts[head] = is_stale ? static_cast<int32_t>(start) : 0;
    }
    if (!is_stale) return;
    // Other CTAs may still look at the samples and at the scales: the next kernel writes those.
    if (num_scales > 0) {
      scorer.scale_channels(num_scaled, channel_scale, values);
      for (int d = thread_index(); reports && d < num_scales; d += kThreads) {
        p.update.late_scales[head * num_scales + d] = channel_scale[d];
      }
      if (range.has_scores) scorer.prepare(channel_scale);
    }
    range.start = 0;
  }
}

}  // namespace cuda
}  // namespace quest
