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

// Summary rows that a group of lanes scores at a time: where there is one row of weights, and with
// kScoreHeads of them.
QUEST_BOTH int lone_rows(int64_t element_size) { return element_size == 4 ? 4 : 8; }
constexpr int kRowsOfHeads = 4;

// Pages that a warp scores at a time, and what it has of them in shared memory: their rows, then
// their part of the mask.
QUEST_BOTH int pages_per_step(const ScoreCall& p) {
  const int rows = num_weight_rows(p) == 1 ? lone_rows(p.summaries.rows.element_size) : kRowsOfHeads;
  return rows * (32 / lanes_for(p.summaries.head_dim / 4));
}
QUEST_BOTH int slot_bytes(const Summaries& s) {
  return static_cast<int>((s.rows.row_bytes + 15) / 16 * 16);
}
QUEST_BOTH int step_bytes(const ScoreCall& p) {
  return pages_per_step(p) * (slot_bytes(p.summaries) + p.summaries.page_size);
}

// One CTA's share of the pages of one (row, KV head). T: of keys and query, R: of summary rows.
// kHasMeans: they may be means and deviations; what is never used takes registers.
template <class T, class R, bool kHasMeans = true>
class PageScorer {
 public:
  QUEST_BOTH static int channel_floats(int head_dim) { return head_dim; }

  QUEST_DEVICE PageScorer(const ScoreCall& p, int row, int kv_head, SharedMemory& memory)
      : p_(p), s_(p.summaries), row_(row), kv_head_(kv_head) {
    batch_row_ = p.rows.q_len > 0 ? row / p.rows.q_len : row;
    weight_stride_ = 2 * s_.head_dim;
    weights_ = memory.take<float>(static_cast<int64_t>(num_weight_rows(p)) * weight_stride_);
    new_row_ = memory.take<char>(kWarps * kMaxRowBytes) + warp_index() * kMaxRowBytes;
    stages_ = memory.take<char>(static_cast<int64_t>(kWarps) * p.num_stages * step_bytes(p)) +
              warp_index() * p.num_stages * step_bytes(p);
    width_ = lanes_for(s_.head_dim / 4);
    lane_ = lane_index() % width_;
  }

  // Rows of the first pages begin to come in; before prepare(), which takes a while.
  QUEST_DEVICE void start(const PageRange& range) {
    ahead_ = range.first + warp_index() * pages_per_step(p_);
#pragma unroll 1
    for (int i = 0; i < p_.num_stages; ++i) fetch_next(range, stages_ + i * step_bytes(p_));
  }

  // channel_scale: of the int8 rows, in shared memory.
  QUEST_DEVICE void prepare(const float* channel_scale) {
    const bool is_sum = p_.group_reduce == GroupReduce::kSum;
    const bool is_mean = kHasMeans && s_.rows.format.kind == SummaryKind::kMeanStd;
    const int head_dim = s_.head_dim, count = num_weight_rows(p_) * head_dim;
    for (int i = thread_index(); i < count; i += kThreads) {
      const int d = i % head_dim, first = i / head_dim;
      float low = 0, high = 0;
#pragma unroll 4
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

  // Stores new summaries where place_of(page) says, which may be nowhere. Behind start().
  template <class PlaceOf>
  QUEST_DEVICE void run(const PageRange& range, const PlaceOf& place_of) {
    for (int64_t page = range.first + warp_index(); page < range.last; page += kWarps) {
      if (page < range.start || page >= range.num_sealed) continue;
      summarise_page<T, kHasMeans>(s_, p_.update, batch_row_, kv_head_, page, range.channel_scale,
                                   new_row_);
      if (char* stored = place_of(page)) store_row<T>(s_, new_row_, stored);
      if (range.has_scores) {
        const R* row = reinterpret_cast<const R*>(new_row_);
        has_one_row() ? score_pages<1, 1>(range, page, row, nullptr)
                      : score_pages<1, kScoreHeads>(range, page, row, nullptr);
      }
    }
    if (range.has_scores) {
      has_one_row() ? score_stored_pages<sizeof(R) == 4 ? 4 : 8, 1>(range)
                    : score_stored_pages<kRowsOfHeads, kScoreHeads>(range);
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

  // Has the mask one part for all heads?
  QUEST_DEVICE bool fetches_mask() const { return p_.rows.mask.data && !p_.rows.mask.head_stride; }

  template <int kRows, int kHeads>
  QUEST_DEVICE void score_stored_pages(const PageRange& range) {
    const int per_step = kRows * (32 / width_), bytes = step_bytes(p_);
    int stage = 0;
#pragma unroll 1
    for (int64_t page = range.first + warp_index() * per_step; page < range.last;
         page += kWarps * per_step) {
      wait_for_oldest(p_.num_stages);
      sync_warp();
      char* slots = stages_ + stage * bytes;
      score_pages<kRows, kHeads>(range, page, nullptr, slots);
      sync_warp();
      fetch_next(range, slots);
      stage = stage + 1 == p_.num_stages ? 0 : stage + 1;
    }
    wait_for_copies<0>();
    sync_warp();
  }

  // Copies of the rows of the pages that are this warp's next begin, and of their mask.
  QUEST_DEVICE void fetch_next(const PageRange& range, char* slots) {
    const int per_step = pages_per_step(p_), slot = slot_bytes(s_);
    const int count =
        static_cast<int>(minimum<int64_t>(per_step, minimum(range.last, range.num_complete) - ahead_));
    constexpr int kPieceBytes = 8 * sizeof(R);
    for (int i = lane_index() / width_; i < count; i += 32 / width_) {
      const char* from = row_of(s_, batch_row_, kv_head_, ahead_ + i);
      char* to = slots + i * slot;
      for (int piece = lane_; piece < s_.head_dim / 4; piece += width_) {
        copy_piece<kPieceBytes>(to + piece * kPieceBytes, from + piece * kPieceBytes);
      }
      // The scale of the page.
      if (sizeof(R) == 1 && lane_ == 0) copy_piece<8>(to + 2 * s_.head_dim, from + 2 * s_.head_dim);
    }
    if (fetches_mask()) fetch_mask(range, slots + per_step * slot);
    commit_copies();
    ahead_ += kWarps * per_step;
  }

  template <int kBytes>
  QUEST_DEVICE void copy_piece(char* to, const char* from) const {
    if (!s_.has_aligned_rows) {
      for (int i = 0; i < kBytes; ++i) to[i] = from[i];
    } else if (kBytes == 8) {
      copy_half_async(to, from);
    } else {
#pragma unroll
      for (int i = 0; i < kBytes; i += 16) copy_async(to + i, from + i, true);
    }
  }

  QUEST_DEVICE void fetch_mask(const PageRange& range, char* to) const {
    const int64_t begin = ahead_ * s_.page_size, stride = p_.rows.mask.token_stride;
    const int64_t count = minimum<int64_t>(
        pages_per_step(p_) * s_.page_size, minimum<int64_t>(range.last * s_.page_size, range.len) - begin);
    const uint8_t* mask = mask_of(p_.rows, row_, 0) + begin * stride;
    const bool is_aligned = stride == 1 && reinterpret_cast<uintptr_t>(mask) % 16 == 0;
    for (int i = lane_index() * 16; i < count; i += 32 * 16) {
      if (is_aligned && begin + i + 16 <= p_.rows.max_seq_len) {
        copy_async(to + i, mask + i, true);
      } else {
        for (int j = i; j < minimum<int64_t>(i + 16, count); ++j) {
          to[j] = static_cast<char>(mask[j * stride]);
        }
      }
    }
  }

  // Bit r: this lane's page r of a step is live, whose part of the mask is at `mask`.
  template <int kRows>
  QUEST_DEVICE uint32_t find_live(const PageRange& range, int64_t page, const char* mask) const {
    const int group = lane_index() / width_, num_groups = 32 / width_, words = s_.page_size / 4;
    uint32_t live = 0;
    if (!p_.rows.mask.data) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int64_t mine = page + r * num_groups + group;
        live |= static_cast<uint32_t>(mine * s_.page_size < range.len) << r;
      }
      return live;
    }
    const int64_t left = minimum<int64_t>(range.last * s_.page_size, range.len) - page * s_.page_size;
#pragma unroll 1
    for (int first = 0; first < kRows * num_groups * words; first += 32) {
      const int64_t behind = left - 4 * (first + lane_index());
      uint32_t word = 0;
      if (behind > 0 && first + lane_index() < kRows * num_groups * words) {
        word = *reinterpret_cast<const uint32_t*>(mask + 4 * (first + lane_index()));
        if (behind < 4) word &= (1u << 8 * behind) - 1;
      }
      const uint32_t bits = ballot(word != 0);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int begin = (r * num_groups + group) * words - first, end = begin + words;
        if (begin >= 32 || end <= 0) continue;
        const uint32_t below = end >= 32 ? ~0u : (1u << end) - 1;
        live |= static_cast<uint32_t>((bits & below & ~0u << maximum(begin, 0)) != 0) << r;
      }
    }
    return live;
  }

  // The page whose summary is new_row, or kRows pages per group of lanes from `page` on, which are
  // in `slots`.
  template <int kRows, int kHeads>
  QUEST_DEVICE void score_pages(const PageRange& range, int64_t page, const R* new_row,
                                const char* slots) {
    const int group = lane_index() / width_, num_groups = 32 / width_;
    const bool has_live = range.order && slots && (fetches_mask() || !p_.rows.mask.data);
    uint32_t live = 0;
    if (has_live) {
      live = find_live<kRows>(range, page, slots + kRows * num_groups * slot_bytes(s_));
    }
    const R* rows[kRows];  // nullptr: no score
    unsigned wanted = 0;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int index = r * num_groups + group;
      const int64_t mine = new_row ? page : page + index;
      const bool is_new = mine >= range.start && mine < range.num_sealed;
      const bool is_wanted = new_row ? group == 0 : mine < range.last && !is_new;
      wanted |= static_cast<unsigned>(is_wanted) << r;
      rows[r] = nullptr;
      if (is_wanted && mine < range.num_complete) {
        rows[r] =
            new_row ? new_row : reinterpret_cast<const R*>(slots + index * slot_bytes(s_));
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
            write(range, wanted >> r & 1, mine, head + h, 1, score, has_live, live >> r & 1);
          }
        }
      }
    }
    if (p_.group_reduce == GroupReduce::kNone) return;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t mine = new_row ? page : page + r * num_groups + group;
      write(range, wanted >> r & 1, mine, 0, p_.rows.group_size, best[r], has_live, live >> r & 1);
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
        if (rows[r]) x[r].load(rows[r] + 8 * piece, true);
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
    if (sizeof(R) > 1 || !row) return 1;
    return *reinterpret_cast<const float*>(row + 2 * s_.head_dim);
  }

  // For all lanes of a warp. first_head, num_heads: of the group, whose choice this is. live: if
  // that is known.
  QUEST_DEVICE void write(const PageRange& range, bool wanted, int64_t page, int first_head,
                          int num_heads, float score, bool has_live, bool live) const {
    if (p_.scores) {
      const int64_t index = score_index(p_, row_, kv_head_, first_head, page);
      if (wanted && lane_ == 0) p_.scores[index] = score;
    }
    if (!range.order) return;
    const int head = kv_head_ * p_.rows.group_size + first_head;
    if (!has_live) {
      live = is_live(p_.rows, row_, head, num_heads, wanted ? page : s_.num_pages, s_.page_size,
                     range.len, lane_, width_);
    }
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
  char* stages_;   // of this warp: [num_stages, step_bytes]
  int64_t ahead_;  // the first page that is not under way
  int width_;  // lanes that share a row, and this one's place among them
  int lane_;
};

QUEST_BOTH int64_t page_scorer_bytes(const ScoreCall& p) {
  return (num_weight_rows(p) * 2 + 1) * p.summaries.head_dim * 4 + kWarps * kMaxRowBytes +
         static_cast<int64_t>(kWarps) * p.num_stages * step_bytes(p) + 256;
}

}  // namespace cuda
}  // namespace quest
