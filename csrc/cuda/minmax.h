// Bounds of query.key: sum_d max(q_d min_d, q_d max_d) = sum_d min(q_d, 0) min_d + max(q_d, 0)
// max_d, one dot product of a row [minimum, maximum] with weights made of the query once.
#pragma once

#include "cuda/minmax_row.h"
#include "cuda/score_step.h"

namespace quest {
namespace cuda {

// A warp has so many pages per group of lanes that share a row.
QUEST_BOTH constexpr int minmax_rows(int64_t element_size) { return element_size == 4 ? 4 : 8; }
QUEST_BOTH int minmax_lanes(int head_dim) {
  return lanes_for(head_dim / 4) < 8 ? 8 : lanes_for(head_dim / 4);
}

// A Kind of PageScorer. T: of keys, query and rows.
template <class T>
class MinMax {
 public:
  QUEST_BOTH static int pages_per_step(const Summaries& s) {
    return kRows * (32 / minmax_lanes(s.head_dim));
  }
  QUEST_BOTH static int64_t shared_bytes(const ScoreCall& p) {
    return p.query.data ? num_page_scores(p) * 2 * p.summaries.head_dim * 4 + 16 : 16;
  }

  QUEST_DEVICE MinMax(const ScoreCall& p, int row, int kv_head, SharedMemory& memory)
      : p_(p), s_(p.summaries), row_(row), kv_head_(kv_head) {
    weights_ = memory.take<float>(p.query.data ? num_page_scores(p) * 2 * s_.head_dim : 0);
    width_ = minmax_lanes(s_.head_dim);
    lane_ = lane_index() % width_;
  }

  QUEST_DEVICE void prepare() {
    const bool is_sum = p_.group_reduce == GroupReduce::kSum;
    const int group_size = p_.rows.group_size;
#pragma unroll 1
    for (int i = 0; i < num_page_scores(p_); ++i) {
      const T* query = query_of<T>(p_.query, p_.rows, row_, kv_head_ * group_size + i);
      float* weights = weights_ + i * 2 * s_.head_dim;
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
  }

  QUEST_DEVICE void make_row(int64_t page, char* row) const {
    make_minmax_row<T>(s_, p_.update, row_ / p_.rows.q_len, kv_head_, page, row);
  }

  QUEST_DEVICE void score(const Step& step) const {
    const int num_groups = 32 / width_, group = lane_index() / width_;
    // The page whose score this lane comes to have: the index is that of scatter_sum.
    int mine = 0, lanes = width_;
#pragma unroll
    for (int rows = kRows / 2; rows > 0; rows /= 2) {
      lanes /= 2;
      mine += lane_ & lanes ? rows : 0;
    }
    const bool writes = (lane_ & (lanes - 1)) == 0;
#pragma unroll 1
    for (int i = 0; i < num_page_scores(p_); ++i) {
      const float sum = scatter_sum(i, step.row_at(group), num_groups * step.slot_bytes);
      // -inf stays, whatever the scale.
      const float score = sum == -kInfinity ? sum : multiply(sum, p_.scale);
      if (writes) step.write(mine * num_groups + group, i, score);
    }
  }

 private:
  static constexpr int kRows = minmax_rows(sizeof(T));

  // The sum over the channels of one of the rows at `slots`, row_step apart, with weights `which`:
  // every lane begins with all and ends with one.
  QUEST_DEVICE float scatter_sum(int which, const char* slots, int row_step) const {
    float sums[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) sums[r] = 0;
#pragma unroll 1
    for (int piece = lane_; piece < s_.head_dim / 4; piece += width_) {
      const float* row = weights_ + which * 2 * s_.head_dim + 8 * piece;
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
  float* weights_;  // [page scores, 2 * head_dim]
  int width_;       // lanes that share a row, and this one's place among them
  int lane_;
};

}  // namespace cuda
}  // namespace quest
