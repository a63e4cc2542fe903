// Page scores: sum_d max(q_d min_d, q_d max_d) = sum_d min(q_d, 0) min_d + max(q_d, 0) max_d, one
// dot product of a summary row [minimum, maximum] with weights made of the query once. Of rows
// [mean, standard deviation] the weights are q and |q|.
#pragma once

#include "cuda/order.h"
#include "cuda/summarise.h"

namespace quest {
namespace cuda {

// Rows of weights: the sum over the group, or every query head by itself.
QUEST_BOTH int num_weight_rows(const ScoreCall& p) {
  if (!p.query.data) return 0;
  return p.group_reduce == GroupReduce::kSum ? 1 : p.rows.group_size;
}

// Where the score of a page is: `select`, of the select heads of the KV head.
QUEST_DEVICE int64_t score_index(const ScoreCall& p, int row, int kv_head, int select,
                                 int64_t page) {
  const int per_group = p.group_reduce == GroupReduce::kNone ? p.rows.group_size : 1;
  const int64_t index = static_cast<int64_t>(row) * p.summaries.num_kv_heads + kv_head;
  return (index * per_group + select) * p.summaries.num_pages + page;
}

// What there is to do for a row, and a CTA's share of it.
struct PageRange {
  int64_t first;
  int64_t last;
  bool has_scores;       // or else pages are summarised only
  int64_t num_complete;  // pages that get a score other than -inf
  int64_t start;         // pages of [start, num_sealed) are summarised from their keys
  int64_t num_sealed;
  float* channel_scale;  // in shared memory, or nullptr
  int len;
  // Of page `first`, for the first select head of the KV head; from one select head to the next.
  int32_t* order;
  int64_t order_stride;

  QUEST_DEVICE int32_t& order_of_page(int select, int64_t page) const {
    return order[select * order_stride + page - first];
  }
};

// Query heads that a row of a summary is scored for at a time.
constexpr int kScoreHeads = 4;

// Summary rows that a group of lanes reads at a time where there is one row of weights. More of
// float32 would spill.
template <class R>
constexpr int kLoneRows = sizeof(R) == 4 ? 4 : 8;

// One CTA's share of the pages of one (row, KV head). T: of keys and query, R: of summary rows,
// of which a group of lanes reads kLone at a time where there is one row of weights. kHasMeans:
// they may be means and deviations; what is never used takes registers.
template <class T, class R, int kLone = kLoneRows<R>, bool kHasMeans = true>
class PageScorer {
 public:
  QUEST_BOTH static int channel_floats(int head_dim) { return head_dim; }

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
    const bool is_mean = kHasMeans && s_.rows.format.kind == SummaryKind::kMeanStd;
    const int head_dim = s_.head_dim, count = num_weight_rows(p_) * head_dim;
    for (int i = thread_index(); i < count; i += kThreads) {
      const int d = i % head_dim, first = i / head_dim;
      float low = 0, high = 0;
      for (int h = first; h < (is_sum ? p_.rows.group_size : first + 1); ++h) {
        float q =
            to_float(query_of<T>(p_.query, p_.rows, row_, kv_head_ * p_.rows.group_size + h)[d]);
        if (channel_scale) q = multiply(q, channel_scale[d]);
        low += q < 0 || is_mean ? q : 0;
        high += is_mean ? fabsf(q) : q < 0 ? 0 : q;  // NaN stays
      }
      weights_[first * weight_stride_ + d] = low;
      weights_[first * weight_stride_ + head_dim + d] = high;
    }
    sync_cta();
  }

  // Stores new summaries where place_of(page) says, which may be nowhere.
  template <class PlaceOf>
  QUEST_DEVICE void run(const PageRange& range, const PlaceOf& place_of) {
    for (int64_t page = range.first + warp_index(); page < range.last; page += kWarps) {
      if (page < range.start || page >= range.num_sealed) continue;
      summarise_page<T, kHasMeans>(s_, p_.update, batch_row_, kv_head_, page, range.channel_scale,
                                   new_row_);
      if (char* stored = place_of(page)) store_row<T>(s_, new_row_, stored);
      if (range.has_scores) {
        const R* row = reinterpret_cast<const R*>(new_row_);
        has_one_row() ? score_pages<1, 1>(range, page, row)
                      : score_pages<1, kScoreHeads>(range, page, row);
      }
    }
    if (range.has_scores) {
      has_one_row() ? score_stored_pages<kLone, 1>(range)
                    : score_stored_pages<4, kScoreHeads>(range);
    }
  }

  // Whether the stored summary of a page is not that of its keys, for a whole warp.
  QUEST_DEVICE bool page_differs(int64_t page, const float* channel_scale) {
    summarise_page<T, kHasMeans>(s_, p_.update, batch_row_, kv_head_, page, channel_scale,
                                 new_row_);
    const bool differs = row_differs<T>(s_, new_row_, row_of(s_, batch_row_, kv_head_, page));
    sync_warp();
    return differs;
  }

  // channel_scale of int8 rows, from the keys; or what is stored has been copied there.
  QUEST_DEVICE void scale_channels(int64_t num_pages, float* channel_scale, WarpValues& shared) {
    cuda::scale_channels<T>(s_, p_.update, batch_row_, kv_head_, num_pages, channel_scale, shared);
  }
  QUEST_DEVICE void complete_channels(float*) const { sync_cta(); }

 private:
  QUEST_DEVICE bool has_one_row() const { return num_weight_rows(p_) == 1; }

  template <int kRows, int kHeads>
  QUEST_DEVICE void score_stored_pages(const PageRange& range) {
    const int per_step = kRows * (32 / width_);
    for (int64_t page = range.first + warp_index() * per_step; page < range.last;
         page += kWarps * per_step) {
      score_pages<kRows, kHeads>(range, page, nullptr);
    }
  }

  // The page whose summary is new_row, or kRows pages per group of lanes from `page` on.
  template <int kRows, int kHeads>
  QUEST_DEVICE void score_pages(const PageRange& range, int64_t page, const R* new_row) {
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
  QUEST_DEVICE void write(const PageRange& range, bool wanted, int64_t page, int first_head,
                          int num_heads, float score) const {
    if (p_.scores) {
      const int64_t index = score_index(p_, row_, kv_head_, first_head, page);
      if (wanted && lane_ == 0) p_.scores[index] = score;
    }
    if (!range.order) return;
    const int head = kv_head_ * p_.rows.group_size + first_head;
    const bool live = is_live(p_.rows, row_, head, num_heads, wanted ? page : s_.num_pages,
                              s_.page_size, range.len, lane_, width_);
    if (wanted && lane_ == 0) range.order_of_page(first_head, page) = order_of(score, live);
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

QUEST_BOTH int64_t page_scorer_bytes(const ScoreCall& p) {
  return (num_weight_rows(p) * 2 + 1) * p.summaries.head_dim * 4 + kWarps * kMaxRowBytes + 256;
}

}  // namespace cuda
}  // namespace quest
