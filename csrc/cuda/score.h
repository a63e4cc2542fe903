// Page scores: sum_d max(q_d min_d, q_d max_d) = sum_d min(q_d, 0) min_d + max(q_d, 0) max_d, one
// dot product of a summary row [minimum, maximum] with weights made of the query once.
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
  int first;
  int last;
  bool has_scores;   // or else pages are summarised only
  int num_complete;  // pages that get a score other than -inf
  int start;         // pages of [start, num_sealed) are summarised from their keys
  int num_sealed;
  float* channel_scale;  // in shared memory, or nullptr
  int len;
  // Of page `first`, for the first select head of the KV head; from one select head to the next.
  int32_t* order;
  int64_t order_stride;

  QUEST_DEVICE int32_t& order_of_page(int select, int64_t page) const {
    return order[select * order_stride + page - first];
  }
};

// Pages that a warp scores at a time: so many per group of lanes, whose rows and part of the mask
// it has in shared memory.
QUEST_BOTH constexpr int score_rows(int64_t element_size) { return element_size == 4 ? 4 : 8; }
// Lanes that share a row.
QUEST_BOTH int score_lanes(int head_dim) {
  return lanes_for(head_dim / 4) < 8 ? 8 : lanes_for(head_dim / 4);
}
QUEST_BOTH int pages_per_step(const Summaries& s) {
  return score_rows(s.rows.element_size) * (32 / score_lanes(s.head_dim));
}
QUEST_BOTH int slot_bytes(const Summaries& s) {
  return static_cast<int>((s.rows.row_bytes + 15) / 16 * 16);
}
QUEST_BOTH int step_bytes(const Summaries& s) {
  return pages_per_step(s) * (slot_bytes(s) + s.page_size);
}

// One CTA's share of the pages of one (row, KV head). T: of keys, query and rows.
// Code is small on purpose: a step runs it once, and what it takes to fetch instructions was
// measured to be the time of a kernel.
template <class T>
class PageScorer {
 public:
  static constexpr bool kHasScales = false;  // of channels
  QUEST_BOTH static int channel_floats(int) { return 0; }

  QUEST_DEVICE PageScorer(const ScoreCall& p, int row, int kv_head, SharedMemory& memory)
      : p_(p), s_(p.summaries), row_(row), kv_head_(kv_head) {
    batch_row_ = p.rows.q_len > 0 ? row / p.rows.q_len : row;
    weight_stride_ = 2 * s_.head_dim;
    weights_ = memory.take<float>(static_cast<int64_t>(num_weight_rows(p)) * weight_stride_);
    slot_ = slot_bytes(s_);
    step_bytes_ = step_bytes(s_);
    new_row_ = memory.take<char>(kWarps * slot_) + warp_index() * slot_;
    stages_ = memory.take<char>(static_cast<int64_t>(kWarps) * p.num_stages * step_bytes_) +
              warp_index() * p.num_stages * step_bytes_;
    width_ = score_lanes(s_.head_dim);
    lane_ = lane_index() % width_;
    per_step_ = pages_per_step(s_);
    rows_ = row_of(s_, batch_row_, kv_head_, 0);
  }

  // Rows of the first pages begin to come in; before prepare(), which takes a while.
  QUEST_DEVICE void start(const PageRange& range) {
    ahead_ = first_page(range);
#pragma unroll 1
    for (int i = 0; i < p_.num_stages; ++i) fetch_next(range, stages_ + i * step_bytes_);
  }

  QUEST_DEVICE void prepare(const float*) {
    const bool is_sum = p_.group_reduce == GroupReduce::kSum;
    const int group_size = p_.rows.group_size, num_rows = num_weight_rows(p_);
#pragma unroll 1
    for (int i = 0; i < num_rows; ++i) {
      const T* query = query_of<T>(p_.query, p_.rows, row_, kv_head_ * group_size + i);
      float* weights = weights_ + i * weight_stride_;
#pragma unroll 1
      for (int d = thread_index(); d < s_.head_dim; d += kThreads) {
        float low = 0, high = 0;
#pragma unroll 4
        for (int h = 0; h < (is_sum ? group_size : 1); ++h) {
          const float q = to_float(query[h * p_.query.head_stride + d]);
          low += q < 0 ? q : 0;
          high += q < 0 ? 0 : q;  // NaN stays
        }
        weights[d] = low;
        weights[s_.head_dim + d] = high;
      }
    }
    sync_cta();
  }

  // Makes and scores the pages of the range; new summaries go where place_of(page) says, which may
  // be nowhere. Before that, whether `sample` has another summary than its keys say, if it is not
  // -1. Behind start().
  template <class PlaceOf>
  QUEST_DEVICE bool run(const PageRange& range, const PlaceOf& place_of, int64_t sample) {
    bool differs = false;
    int stage = 0;
    // The sample is a step of its own, so that the code that makes summaries is here once.
#pragma unroll 1
    for (int page = sample >= 0 ? -1 : first_page(range); page < range.last;) {
      const bool is_sample = page < 0;
      char* slots = stages_ + stage * step_bytes_;
      if (!is_sample && range.has_scores) {
        wait_for_oldest(p_.num_stages);
        sync_warp();
      }
      const int first = is_sample ? static_cast<int>(sample) : maximum(page, range.start);
      const int last =
          is_sample ? first + 1 : minimum(page + per_step_, minimum(range.last, range.num_sealed));
#pragma unroll 1
      for (int made = first; made < last; ++made) {
        char* row = is_sample || !range.has_scores ? new_row_ : slots + (made - page) * slot_;
        summarise_page<T>(s_, p_.update, batch_row_, kv_head_, made, row);
        if (is_sample) {
          differs = row_differs<T>(s_, row, row_at(made));
        } else if (char* stored = place_of(made)) {
          store_row<T>(s_, row, stored);
        }
        sync_warp();
      }
      if (is_sample) {
        page = first_page(range);
        continue;
      }
      if (range.has_scores) {
        score(range, page, slots);
        sync_warp();
        fetch_next(range, slots);
        stage = stage + 1 == p_.num_stages ? 0 : stage + 1;
      }
      page += kWarps * per_step_;
    }
    if (range.has_scores) wait_for_copies<0>();
    sync_warp();
    return differs;
  }

 private:
  static constexpr int kRows = score_rows(sizeof(T));
  static constexpr int kPieceBytes = 8 * sizeof(T);

  QUEST_DEVICE int first_page(const PageRange& range) const {
    return range.first + warp_index() * per_step_;
  }
  QUEST_DEVICE const char* row_at(int page) const {
    return rows_ + page * s_.rows.page_stride * static_cast<int64_t>(sizeof(T));
  }
  // Has the mask one part for all heads?
  QUEST_DEVICE bool fetches_mask() const { return p_.rows.mask.data && !p_.rows.mask.head_stride; }

  // Copies of the stored rows of the pages that are this warp's next begin, and of their mask.
  QUEST_DEVICE void fetch_next(const PageRange& range, char* slots) {
    const int count = minimum(per_step_, minimum(range.last, range.num_complete) - ahead_);
#pragma unroll 1
    for (int i = lane_index() / width_; i < count; i += 32 / width_) {
      const int page = ahead_ + i;
      if (page >= range.start && page < range.num_sealed) continue;
      const char* from = row_at(page) + lane_ * kPieceBytes;
      char* to = slots + i * slot_ + lane_ * kPieceBytes;
#pragma unroll 1
      for (int piece = lane_; piece < s_.head_dim / 4; piece += width_) {
        copy_piece(to, from);
        to += width_ * kPieceBytes;
        from += width_ * kPieceBytes;
      }
    }
    if (fetches_mask()) fetch_mask(range, slots + per_step_ * slot_);
    commit_copies();
    ahead_ += kWarps * per_step_;
  }

  QUEST_DEVICE void copy_piece(char* to, const char* from) const {
    if (s_.has_aligned_rows) {
#pragma unroll
      for (int i = 0; i < kPieceBytes; i += 16) copy_async(to + i, from + i, true);
    } else {
#pragma unroll 1
      for (int i = 0; i < kPieceBytes; ++i) to[i] = from[i];
    }
  }

  QUEST_DEVICE void fetch_mask(const PageRange& range, char* to) const {
    const int begin = ahead_ * s_.page_size;
    const int count =
        minimum(per_step_ * s_.page_size, minimum(range.last * s_.page_size, range.len) - begin);
    const int64_t stride = p_.rows.mask.token_stride;
    const uint8_t* mask = mask_of(p_.rows, row_, 0) + begin * stride;
    const bool is_aligned = stride == 1 && reinterpret_cast<uintptr_t>(mask) % 16 == 0;
#pragma unroll 1
    for (int i = lane_index() * 16; i < count; i += 32 * 16) {
      if (is_aligned && begin + i + 16 <= p_.rows.max_seq_len) {
        copy_async(to + i, mask + i, true);
      } else {
#pragma unroll 1
        for (int j = i; j < minimum(i + 16, count); ++j)
          to[j] = static_cast<char>(mask[j * stride]);
      }
    }
  }

  // Whether one of the heads [first_head, first_head + num_heads) attends a position of the page.
  // `mask`: the part of the page, where the mask is fetched.
  QUEST_DEVICE bool is_live(const PageRange& range, int page, int first_head, int num_heads,
                            const char* mask) const {
    const int begin = page * s_.page_size, count = minimum(s_.page_size, range.len - begin);
    if (!p_.rows.mask.data) return count > 0;
    bool found = false;
    if (fetches_mask()) {
#pragma unroll 1
      for (int i = 0; i < count; i += 8) {
        const HalfVector x = *reinterpret_cast<const HalfVector*>(mask + i);
        const uint64_t live = x.words[0] | static_cast<uint64_t>(x.words[1]) << 32;
        found = found || (count - i < 8 ? live << 8 * (8 - (count - i)) : live) != 0;
      }
      return found;
    }
#pragma unroll 1
    for (int i = 0; i < num_heads * count; ++i) {
      const int64_t token = (begin + i % count) * p_.rows.mask.token_stride;
      found = found || mask_of(p_.rows, row_, first_head + i / count)[token];
    }
    return found;
  }

  // Pages from `page` on, whose rows are in `slots`.
  QUEST_DEVICE void score(const PageRange& range, int page, const char* slots) const {
    const int num_groups = 32 / width_, group = lane_index() / width_;
    // The page whose score this lane comes to have: the index is that of scatter_sum.
    int mine = 0, lanes = width_;
#pragma unroll
    for (int rows = kRows / 2; rows > 0; rows /= 2) {
      lanes /= 2;
      mine += lane_ & lanes ? rows : 0;
    }
    const bool writes = (lane_ & (lanes - 1)) == 0;
    const int index = mine * num_groups + group;
    page += index;
    const bool is_complete = page < range.num_complete, is_mine = writes && page < range.last;
    const char* mask = slots + per_step_ * slot_ + index * s_.page_size;
    const int num_heads = num_weight_rows(p_), first_head = kv_head_ * p_.rows.group_size;
    const bool is_none = p_.group_reduce == GroupReduce::kNone;
    float best = -kInfinity;
#pragma unroll 1
    for (int head = 0; head < num_heads; ++head) {
      const float sum = scatter_sum(head, slots + group * slot_);
      const float score = is_complete ? sum : -kInfinity;
      // NaN stays the maximum.
      best = is_none || score > best || score != score ? score : best;
      if (!is_none && head + 1 < num_heads) continue;
      if (!is_mine) continue;
      const int select = is_none ? head : 0;
      if (p_.scores) p_.scores[score_index(p_, row_, kv_head_, select, page)] = best;
      if (range.order) {
        const bool live =
            is_live(range, page, first_head + select, is_none ? 1 : p_.rows.group_size, mask);
        range.order_of_page(select, page) = order_of(best, live);
      }
    }
  }

  // The sum over the channels of one of the rows at `slots`, from a group of lanes to the next,
  // with a row of weights: every lane begins with all and ends with one.
  QUEST_DEVICE float scatter_sum(int head, const char* slots) const {
    float sums[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) sums[r] = 0;
    const int row_step = 32 / width_ * slot_;
#pragma unroll 1
    for (int piece = lane_; piece < s_.head_dim / 4; piece += width_) {
      const float* row = weights_ + head * weight_stride_ + 8 * piece;
      float weights[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) weights[i] = row[i];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        Eight<T> x;
        x.load(reinterpret_cast<const T*>(slots + r * row_step) + 8 * piece, true);
#pragma unroll
        for (int i = 0; i < 8; ++i) sums[r] = multiply_add(x[i], weights[i], sums[r]);
      }
    }
    int lanes = width_;
#pragma unroll
    for (int rows = kRows / 2; rows > 0; rows /= 2) {
      lanes /= 2;
      const bool is_upper = lane_ & lanes;
#pragma unroll
      for (int r = 0; r < rows; ++r) {
        const float mine = is_upper ? sums[r + rows] : sums[r];
        sums[r] = mine + shuffle_xor(is_upper ? sums[r] : sums[r + rows], lanes);
      }
    }
    for (lanes /= 2; lanes > 0; lanes /= 2) sums[0] += shuffle_xor(sums[0], lanes);
    return sums[0];
  }

  const ScoreCall& p_;
  const Summaries& s_;
  int row_;
  int kv_head_;
  int batch_row_;
  float* weights_;  // [weight rows, 2 * head_dim]
  int weight_stride_;
  int slot_;
  int step_bytes_;
  char* new_row_;
  char* stages_;  // of this warp: [num_stages, step_bytes]
  int ahead_;     // the first page that is not under way
  int width_;     // lanes that share a row, and this one's place among them
  int lane_;
  int per_step_;
  const char* rows_;
};

QUEST_BOTH int64_t page_scorer_bytes(const ScoreCall& p) {
  return num_weight_rows(p) * 2 * p.summaries.head_dim * 4 +
         static_cast<int64_t>(kWarps) *
             (slot_bytes(p.summaries) + p.num_stages * step_bytes(p.summaries)) +
         256;
}

}  // namespace cuda
}  // namespace quest
