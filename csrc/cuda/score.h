// Page scores: sum_d max(q_d min_d, q_d max_d) = sum_d min(q_d, 0) min_d + max(q_d, 0) max_d, one
// dot product of a summary row [minimum, maximum] with weights made of the query once.
#pragma once

#include "cuda/summarise.h"

namespace quest {
namespace cuda {

// What select_pages orders pages by: integers in the order of the scores, NaN above all, a page
// with no position to attend below all.
constexpr int32_t kNaNOrder = 0x7ffffffe;
constexpr int32_t kDeadOrder = -0x7fffffff - 1;

QUEST_DEVICE int32_t order_of(float score, bool is_live) {
  if (!is_live) return kDeadOrder;
  if (score != score) return kNaNOrder;
  return flip_negative<float>(static_cast<int32_t>(as_bits(score + 0.0f)));  // -0 and +0 are equal
}

// Rows of weights: the sum over the group, or every query head by itself.
QUEST_BOTH int num_weight_rows(const ScoreCall& p) {
  if (!p.query.data) return 0;
  return p.group_reduce == GroupReduce::kSum ? 1 : p.rows.group_size;
}

// Query heads that a row of a summary is scored for at a time.
constexpr int kScoreHeads = 4;

// Summary rows that a group of lanes reads at a time where there is one row of weights. More of
// float32 would spill.
template <class R>
constexpr int kLoneRows = sizeof(R) == 4 ? 4 : 8;

// One CTA's share of the pages of one (row, KV head). T: of keys and query, R: of summary rows.
template <class T, class R>
class PageScorer {
 public:
  QUEST_DEVICE PageScorer(const ScoreCall& p, int row, int kv_head, SharedMemory& memory)
      : p_(p), s_(p.summaries), row_(row), kv_head_(kv_head) {
    batch_row_ = p.rows.q_len > 0 ? row / p.rows.q_len : row;
    weight_stride_ = 2 * s_.head_dim;
    weights_ = memory.take<float>(static_cast<int64_t>(num_weight_rows(p)) * weight_stride_);
    new_row_ = memory.take<char>(kWarps * kMaxRowBytes) + warp_index() * kMaxRowBytes;
    width_ = lanes_for(s_.head_dim / 4);
    lane_ = lane_index() % width_;
  }

  // channel_scale: of the int8 rows, in shared memory.
  QUEST_DEVICE void prepare(const float* channel_scale) {
    const bool is_sum = p_.group_reduce == GroupReduce::kSum;
    const int head_dim = s_.head_dim, count = num_weight_rows(p_) * head_dim;
    for (int i = thread_index(); i < count; i += kThreads) {
      const int d = i % head_dim, first = i / head_dim;
      float low = 0, high = 0;
      for (int h = first; h < (is_sum ? p_.rows.group_size : first + 1); ++h) {
        float q =
            to_float(query_of<T>(p_.query, p_.rows, row_, kv_head_ * p_.rows.group_size + h)[d]);
        if (channel_scale) q = multiply(q, channel_scale[d]);
        low += q < 0 ? q : 0;
        high += q < 0 ? 0 : q;  // NaN stays
      }
      weights_[first * weight_stride_ + d] = low;
      weights_[first * weight_stride_ + head_dim + d] = high;
    }
    sync_cta();
  }

  struct Range {
    int64_t first;
    int64_t last;
    bool has_scores;       // or else pages are summarised only
    int64_t num_complete;  // pages that get a score other than -inf
    int64_t start;         // pages of [start, num_sealed) are summarised from their keys
    int64_t num_sealed;
    const float* channel_scale;
    int len;
  };

  // Stores new summaries of the pages for which stores(page).
  template <class Stores>
  QUEST_DEVICE void run(const Range& range, const Stores& stores) {
    for (int64_t page = range.first + warp_index(); page < range.last; page += kWarps) {
      if (page < range.start || page >= range.num_sealed) continue;
      summarise_page<T>(s_, p_.update, batch_row_, kv_head_, page, range.channel_scale, new_row_);
      if (stores(page)) store_row<T>(s_, new_row_, row_of(s_, batch_row_, kv_head_, page));
      if (range.has_scores) {
        const R* row = reinterpret_cast<const R*>(new_row_);
        has_one_row() ? score_pages<1, 1>(range, page, row)
                      : score_pages<1, kScoreHeads>(range, page, row);
      }
    }
    if (range.has_scores) {
      has_one_row() ? score_stored_pages<kLoneRows<R>, 1>(range)
                    : score_stored_pages<4, kScoreHeads>(range);
    }
  }

  // Whether the stored summary of a page is not that of its keys, for a whole warp.
  QUEST_DEVICE bool page_differs(int64_t page, const float* channel_scale) {
    summarise_page<T>(s_, p_.update, batch_row_, kv_head_, page, channel_scale, new_row_);
    const bool differs = row_differs<T>(s_, new_row_, row_of(s_, batch_row_, kv_head_, page));
    sync_warp();
    return differs;
  }

 private:
  QUEST_DEVICE bool has_one_row() const { return num_weight_rows(p_) == 1; }

  template <int kRows, int kHeads>
  QUEST_DEVICE void score_stored_pages(const Range& range) {
    const int per_step = kRows * (32 / width_);
    for (int64_t page = range.first + warp_index() * per_step; page < range.last;
         page += kWarps * per_step) {
      score_pages<kRows, kHeads>(range, page, nullptr);
    }
  }

  // The page whose summary is new_row, or kRows pages per group of lanes from `page` on.
  template <int kRows, int kHeads>
  QUEST_DEVICE void score_pages(const Range& range, int64_t page, const R* new_row) {
    const int group = lane_index() / width_, num_groups = 32 / width_;
    const R* rows[kRows];  // nullptr: no score
    unsigned wanted = 0;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t mine = new_row ? page : page + r * num_groups + group;
      const bool is_new = mine >= range.start && mine < range.num_sealed;
      const bool is_wanted = new_row ? group == 0 : mine < range.last && !is_new;
      wanted |= static_cast<unsigned>(is_wanted) << r;
      rows[r] = nullptr;
      if (is_wanted && mine < range.num_complete) {
        rows[r] =
            new_row ? new_row : reinterpret_cast<const R*>(row_of(s_, batch_row_, kv_head_, mine));
      }
    }
    float best[kRows];
    const int num_heads = num_weight_rows(p_);
#pragma unroll
    for (int r = 0; r < kRows; ++r) best[r] = -kInfinity;
    for (int head = 0; head < num_heads; head += kHeads) {
      float scores[kRows][kHeads];
      dot(rows, head, scores);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        if (head + h >= num_heads) break;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const float score = scores[r][h];
          // NaN stays the maximum.
          best[r] = score > best[r] || score != score ? score : best[r];
          if (p_.group_reduce == GroupReduce::kNone) {
            const int64_t mine = new_row ? page : page + r * num_groups + group;
            write(range, wanted >> r & 1, mine, head + h, 1, score);
          }
        }
      }
    }
    if (p_.group_reduce == GroupReduce::kNone) return;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t mine = new_row ? page : page + r * num_groups + group;
      write(range, wanted >> r & 1, mine, 0, p_.rows.group_size, best[r]);
    }
  }

  // With rows of weights [head, head + kHeads), the last one as often as needed; -inf for no row.
  template <int kRows, int kHeads>
  QUEST_DEVICE void dot(const R* const (&rows)[kRows], int head,
                        float (&scores)[kRows][kHeads]) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int h = 0; h < kHeads; ++h) scores[r][h] = 0;
    }
    const int last = num_weight_rows(p_) - 1;
    for (int piece = lane_; piece < s_.head_dim / 4; piece += width_) {
      Eight<R> x[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        x[r].clear();
        if (rows[r]) x[r].load(rows[r] + 8 * piece, s_.has_aligned_rows);
      }
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        const float* row = weights_ + minimum(head + h, last) * weight_stride_ + 8 * piece;
        float weights[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) weights[i] = row[i];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            scores[r][h] = multiply_add(x[r][i], weights[i], scores[r][h]);
          }
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float scale = page_scale(rows[r]);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        const float score = sum_of_warp(scores[r][h], width_);
        scores[r][h] = rows[r] ? multiply(score, scale) : -kInfinity;
      }
    }
  }

  QUEST_DEVICE float page_scale(const R* row) const {
    float scale = 1;
    if (sizeof(R) > 1 || !row) return scale;
    const R* stored = row + 2 * s_.head_dim;
    if (s_.has_aligned_rows) return *reinterpret_cast<const float*>(stored);
    memcpy(&scale, stored, sizeof(scale));
    return scale;
  }

  // For all lanes of a warp. first_head, num_heads: of the group, whose choice this is.
  QUEST_DEVICE void write(const Range& range, bool wanted, int64_t page, int first_head,
                          int num_heads, float score) const {
    const int per_group = p_.group_reduce == GroupReduce::kNone ? p_.rows.group_size : 1;
    const int64_t select_head =
        (static_cast<int64_t>(row_) * s_.num_kv_heads + kv_head_) * per_group + first_head;
    const int64_t index = select_head * s_.num_pages + page;
    if (p_.scores) {
      if (wanted && lane_ == 0) p_.scores[index] = score;
      return;
    }
    const int head = kv_head_ * p_.rows.group_size + first_head;
    const bool live = is_live(p_.rows, row_, head, num_heads, wanted ? page : s_.num_pages,
                              s_.page_size, range.len, lane_, width_);
    if (wanted && lane_ == 0) p_.order[index] = order_of(score, live);
  }

  const ScoreCall& p_;
  const Summaries& s_;
  int row_;
  int kv_head_;
  int batch_row_;
  float* weights_;  // [weight rows, 2 * head_dim]
  int weight_stride_;
  char* new_row_;
  int width_;  // lanes that share a row, and this one's place among them
  int lane_;
};

inline int64_t score_shared_bytes(const ScoreCall& p) {
  return (num_weight_rows(p) * 2 + 1) * p.summaries.head_dim * 4 + kWarps * kMaxRowBytes + 256;
}

// Kernel 1 (calls.h). Grid: (row, KV head), part.
template <class T, class R>
QUEST_KERNEL(kThreads, 1)
score_kernel(QUEST_PARAM ScoreCall p) {
  SharedMemory memory;
  WarpValues& values = *memory.take<WarpValues>(1);
  float* channel_scale = memory.take<float>(p.summaries.head_dim);
  const Summaries& s = p.summaries;
  const int row = cta_x() / s.num_kv_heads, kv_head = cta_x() % s.num_kv_heads, part = cta_y();
  const int batch_row = row / p.rows.q_len;
  const bool is_first_query = row % p.rows.q_len == 0;
  if (p.arrivals && part == 0) {
    const int64_t first = static_cast<int64_t>(cta_x()) * p.rows.group_size;
    for (int h = thread_index(); h < p.rows.group_size; h += kThreads) p.arrivals[first + h] = 0;
  }

  typename PageScorer<T, R>::Range range = {};
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

  const int64_t num_scaled = floor_to_power_of_two(span.num_sealed);
  if (s.rows.format.kind == SummaryKind::kMinMaxInt8) {
    range.channel_scale = channel_scale;
    float* stored = channel_scale_of(s, batch_row, kv_head);
    if (updates && range.start == 0 && num_scaled > 0) {
      scale_channels<T>(s, p.update, batch_row, kv_head, num_scaled, channel_scale, values);
      for (int d = thread_index(); reports && d < s.head_dim; d += kThreads) {
        stored[d] = channel_scale[d];
      }
    } else {
      for (int d = thread_index(); d < s.head_dim; d += kThreads) channel_scale[d] = stored[d];
      sync_cta();
    }
  }

  PageScorer<T, R> scorer(p, row, kv_head, memory);
  if (range.has_scores) scorer.prepare(range.channel_scale);
  const int64_t start = range.start;
  bool is_stale = false;
  const auto stores = [&](int64_t page) {
    return is_first_query && !(is_stale && is_sample(span, start, page));
  };
  // At first as if nobody else had written the cache: to find that out takes as long.
#pragma unroll 1
  for (;;) {
    scorer.run(range, stores);
    if (is_stale) return;
    bool differs = false;
    if (updates && start > 0 && warp_index() < kNumSamples) {
      differs = scorer.page_differs(sample_of(span, start, warp_index()), range.channel_scale);
    }
    is_stale = any_in_cta(differs);
    if (reports && thread_index() == 0) {
      p.update.stale_starts[batch_row * s.num_kv_heads + kv_head] =
          is_stale ? static_cast<int32_t>(start) : 0;
    }
    if (!is_stale) return;
    // Other CTAs may still look at the samples and at the scales: the next kernel writes those.
    if (s.rows.format.kind == SummaryKind::kMinMaxInt8) {
      scale_channels<T>(s, p.update, batch_row, kv_head, num_scaled, channel_scale, values);
      if (range.has_scores) scorer.prepare(channel_scale);
    }
    range.start = 0;
  }
}

// Writes what kernel 1 left to be written for a (batch row, KV head), by a whole CTA.
template <class T>
QUEST_DEVICE void finish_head(const FinishCall& p, int batch_row, int kv_head, SharedMemory memory,
                              WarpValues& values) {
  const Summaries& s = p.summaries;
  const int64_t start = p.update.stale_starts[batch_row * s.num_kv_heads + kv_head];
  if (start == 0) return;
  float* channel_scale = memory.take<float>(s.head_dim);
  char* row = memory.take<char>(kWarps * kMaxRowBytes) + warp_index() * kMaxRowBytes;
  const Span span = read_positions(p.update, s, values);
  if (s.rows.format.kind == SummaryKind::kMinMaxInt8) {
    const int64_t num_scaled = floor_to_power_of_two(span.num_sealed);
    scale_channels<T>(s, p.update, batch_row, kv_head, num_scaled, channel_scale, values);
    float* stored = channel_scale_of(s, batch_row, kv_head);
    for (int d = thread_index(); d < s.head_dim; d += kThreads) stored[d] = channel_scale[d];
  }
  if (warp_index() < kNumSamples) {
    const int64_t page = sample_of(span, start, warp_index());
    summarise_page<T>(s, p.update, batch_row, kv_head, page, channel_scale, row);
    store_row<T>(s, row, row_of(s, batch_row, kv_head, page));
  }
}

// Of the whole update, by one CTA.
QUEST_DEVICE void finish_update(const FinishCall& p, WarpValues& values) {
  const Span span = read_positions(p.update, p.summaries, values);
  if (thread_index() > 0) return;
  int64_t* next = p.update.next_position;
  *p.update.num_sealed = span.num_sealed;
  if (next && *next >= 0) *next = span.end;
}

constexpr int64_t kFinishSharedBytes = kMaxHeadDim * 4 + kWarps * kMaxRowBytes + 256;

// Behind kernel 1 where nothing is attended. Grid: (batch row, KV head).
template <class T>
QUEST_KERNEL(kThreads, 2)
finish_kernel(QUEST_PARAM FinishCall p) {
  SharedMemory memory;
  WarpValues& values = *memory.take<WarpValues>(1);
  const int num_kv_heads = p.summaries.num_kv_heads;
  finish_head<T>(p, cta_x() / num_kv_heads, cta_x() % num_kv_heads, memory, values);
  if (cta_x() == 0) finish_update(p, values);
}

}  // namespace cuda
}  // namespace quest
