// Scores of page sketches: log of the sum of exp over the tokens of a page,
// their products with the query being estimated. Those are whole numbers, from
// matrix instructions whose 16 rows are query heads and whose 8 columns are
// tokens.
#pragma once

#include "cuda/score_step.h"
#include "cuda/sketch_make.h"
#include "numbers.h"

namespace quest {
namespace cuda {

// A Kind of PageScorer. T: of keys and query.
template <class T>
class Sketch {
 public:
  QUEST_BOTH static int pages_per_step(const Summaries&) { return 8; }
  QUEST_BOTH static int64_t shared_bytes(const ScoreCall& p) {
    const int64_t heads = num_padded_heads(p);
    return heads * code_stride(p.summaries.head_dim) + heads * sizeof(Head) +
           kWarps * kSketchScratch * 4;
  }

  QUEST_DEVICE Sketch(const ScoreCall& p, int row, int kv_head, SharedMemory& memory)
      : p_(p),
        s_(p.summaries),
        row_(row),
        kv_head_(kv_head),
        layout_(sketch_row(p.summaries.head_dim, p.summaries.rows.format)) {
    codes_ = memory.take<char>(num_padded_heads(p) * code_stride(s_.head_dim));
    heads_ = memory.take<Head>(num_padded_heads(p));
    scratch_ = memory.take<float>(kWarps * kSketchScratch) + warp_index() * kSketchScratch;
  }

  // The rotated query in whole numbers.
  QUEST_DEVICE void prepare() {
    const Rotation rotation(s_.head_dim);
    const int group_size = p_.rows.group_size, rows = rotation.rows_at_a_time();
    const float scale = divide(p_.scale, static_cast<float>(rotation_size(s_.head_dim)));
    const bool has_two = has_second_plane();
#pragma unroll 1
    for (int first = warp_index() * rows; first < group_size; first += kWarps * rows) {
      Vectors x;
      int heads[kVectors], total[kVectors], odd[kVectors];
      float most[kVectors];
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        heads[v] = minimum(first + rotation.row(v), group_size - 1);
        const int head = kv_head_ * group_size + heads[v];
        rotation.load(query_of<T>(p_.query, p_.rows, row_, head), v, false, x[v]);
      }
      rotation.rotate(x);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        most[v] = odd[v] = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          most[v] = fmaxf(most[v], fabsf(x[v][i]));
          odd[v] |= !(fabsf(x[v][i]) < kInfinity);
        }
      }
      // A number that is none makes others of the rest of its block.
      rotation.reduce(odd, [](int a, int b) { return a | b; });
      rotation.reduce(most, [](float a, float b) { return fmaxf(a, b); });
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const float step = fmaxf(divide(most[v], 127.0f), kSketchMinScale);
        const float inverse = divide(1.0f, step);
        uint32_t word = 0;
        total[v] = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int code = odd[v] ? 0 : nearest_int(multiply(x[v][i], inverse));
          total[v] += code;
          word |= static_cast<uint32_t>(code & 255) << 8 * i;
        }
        most[v] = step;
        char* codes = codes_ + heads[v] * code_stride(s_.head_dim) + rotation.channel(v);
        *reinterpret_cast<uint32_t*>(codes) = word;
      }
      rotation.reduce(total, [](int a, int b) { return a + b; });
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const float factor = multiply(most[v], multiply(scale, kLog2e<float>));
        if (lane_index() > 0) continue;
        heads_[heads[v]] = {odd[v] ? as_float(0x7fc00000u) : factor,
                            static_cast<int32_t>(as_bits(kShift)) - total[v] * (has_two ? 3 : 1)};
      }
    }
  }

  QUEST_DEVICE void make_row(int64_t page, char* row) const {
    const T* keys = cache_of<T>(p_.update.key_cache, row_ / p_.rows.q_len, kv_head_) +
                    page * s_.page_size * p_.update.key_cache.token_stride;
    SketchMaker<T>(s_, p_.update, scratch_).make(keys, row);
  }

  QUEST_DEVICE void score(const Step& step) const {
#pragma unroll 1
    for (int first = 0; first < p_.rows.group_size; first += kRows) score_heads(step, first);
  }

 private:
  static constexpr int kRows = 16;  // heads at a time
  static constexpr int kBlocks = kMaxHeadDim / kSketchBlock;
  // Whole numbers below 2^22 that are added to its bits are added to it.
  static constexpr float kShift = 12582912.0f;

  struct Head {
    float factor;   // of the query, in units of log2
    int32_t start;  // of products with tokens: bits of kShift, less what all
                    // channels have too much
  };

  QUEST_BOTH static int num_padded_heads(const ScoreCall& p) {
    return p.query.data ? (p.rows.group_size + kRows - 1) / kRows * kRows : 0;
  }
  // Whole vectors, and no bank is that of the same lane of another head.
  QUEST_BOTH static int code_stride(int head_dim) {
    return vectors_per_row(head_dim) * kVectorChannels + 16;
  }
  QUEST_DEVICE bool has_second_plane() const { return layout_.num_planes == 2; }

  QUEST_DEVICE static uint32_t word_at(const char* p, int index) {
    return reinterpret_cast<const uint32_t*>(p)[index];
  }

  QUEST_DEVICE static HalfVector pair_at(const char* p, int index) {
    return reinterpret_cast<const HalfVector*>(p)[index];
  }

  // Of heads [first, first + 16) of the group. Lane i has heads first + i / 4
  // and 8 behind, channels 4 * (i % 4) to 4 * (i % 4) + 3 of each block of 32
  // and 16 behind.
  QUEST_DEVICE void score_heads(const Step& step, int first) const {
    const int row = lane_index() / 4, column = lane_index() % 4;
    const int stride = code_stride(s_.head_dim), last = p_.pages_per_step - 1;
    const int num_heads = minimum(kRows, p_.rows.group_size - first);
    const char* codes = codes_ + (first + row) * stride;
    uint32_t query[kBlocks][4];
    int means[4] = {0, 0, 0, 0};  // columns are pages
    const char* mean = step.row_at(minimum(row, last)) + layout_.mean;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      if (b == kBlocks / 2 && s_.head_dim <= kVectorChannels) break;
      query[b][0] = word_at(codes, 8 * b + column);
      query[b][1] = word_at(codes + 8 * stride, 8 * b + column);
      query[b][2] = word_at(codes, 8 * b + column + 4);
      query[b][3] = word_at(codes + 8 * stride, 8 * b + column + 4);
      multiply_bytes(means, query[b], word_at(mean, 8 * b + column),
                     word_at(mean, 8 * b + column + 4));
    }
    // Of pages 2 * column and the next: what the lane has the means of.
    LogSum mine[2];
#pragma unroll 1
    for (int pair = 0; pair <= last; pair += 2) {
      LogSum pages[2];
#pragma unroll 1
      for (int token = 0; token < s_.page_size; token += kSketchTile) {
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          const int index = minimum(pair + odd, last);
          add_tile(step, index, token, first, num_heads, query, pages[odd]);
        }
      }
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (8 * half >= num_heads) break;
          pages[odd].sums[half] += shuffle_xor(pages[odd].sums[half], 1);
          pages[odd].sums[half] += shuffle_xor(pages[odd].sums[half], 2);
        }
        if (2 * column == pair) mine[odd] = pages[odd];
      }
    }
#pragma unroll 1
    for (int i = 0; i < 4; ++i) {
      const int odd = i % 2, half = i / 2;
      const int head = first + row + 8 * half, index = 2 * column + odd;
      if (head >= p_.rows.group_size || index > last) continue;
      const LogSum page = odd ? mine[1] : mine[0];
      const float sum = half ? page.sums[1] : page.sums[0];
      const float top = half ? page.tops[1] : page.tops[0];
      const int mean = half ? (odd ? means[3] : means[2]) : (odd ? means[1] : means[0]);
      float scale;
      memcpy(&scale, step.row_at(index) + layout_.mean_scale, sizeof(scale));
      const float of_mean =
          multiply(multiply(scale, heads_[head].factor), static_cast<float>(mean));
      const float score = multiply(of_mean + shift_of(top), kLn2<float>) + natural_log(sum);
      step.write(index, head, sum == 0 ? -kInfinity : score);
    }
  }

  // Of the tokens of a page, without the mean, for two heads: the highest logit
  // in units of log2, and the sum of exp2(logit - shift_of(top)).
  struct LogSum {
    float tops[2] = {-kInfinity, -kInfinity};
    float sums[2] = {0, 0};
  };
  QUEST_DEVICE static float shift_of(float top) { return fabsf(top) == kInfinity ? 0 : top; }

  // Up to 16 tokens from `token` on.
  QUEST_DEVICE void add_tile(const Step& step, int index, int token, int first, int num_heads,
                             const uint32_t (&query)[kBlocks][4], LogSum& found) const {
    const int column = lane_index() % 4;
    const char* page = step.row_at(index);
    const int num_blocks = (s_.head_dim + kSketchBlock - 1) / kSketchBlock;
    Head heads[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      heads[half] = heads_[minimum(first + lane_index() / 4 + 8 * half, p_.rows.group_size - 1)];
    }
    // Of tokens 4 * column to 4 * column + 3: the even ones, the odd ones.
    int32_t products[2][4];
#pragma unroll
    for (int i = 0; i < 8; ++i) products[i / 4][i % 4] = heads[i / 2 % 2].start;
    const char* tile = page + token * num_blocks * 4;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      if (b == kBlocks / 2 && s_.head_dim <= kVectorChannels) break;
      add_block(tile + b * kSketchTile * 4, query[b], products);
    }
    float scales[4];
    const HalfVector stored = pair_at(page + layout_.token_scales + 2 * token, column);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t two = stored.words[i / 2];
      scales[i] = multiply(as_float(i % 2 ? two & 0xffff0000u : two << 16), level_unit());
    }
    const bool is_own = p_.rows.mask.head_stride != 0;
    unsigned live = 0;
#pragma unroll 1
    for (int half = 0; half < (is_own ? 2 : 1); ++half) {
      const int head = minimum(first + lane_index() / 4 + 8 * half, p_.rows.group_size - 1);
      live |= step.live_tokens(index, token + 4 * column, head) << 4 * half;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (8 * half >= num_heads) break;
      float x[4], top = found.tops[half];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t product = static_cast<uint32_t>(products[i % 2][2 * half + i / 2]);
        x[i] = multiply(multiply(as_float(product) - kShift, heads[half].factor), scales[i]);
        x[i] = live >> (is_own ? 4 * half + i : i) & 1 ? x[i] : -kInfinity;
        top = fmaxf(top, x[i]);
      }
      top = fmaxf(top, shuffle_xor(top, 1));
      top = fmaxf(top, shuffle_xor(top, 2));
      const float shift = shift_of(top);
      float sum = multiply(found.sums[half], power_of_2(found.tops[half] - shift));
#pragma unroll
      for (int i = 0; i < 4; ++i) sum += power_of_2(x[i] - shift);
      found.tops[half] = top;
      found.sums[half] = sum;
    }
  }

  // Products are with 2 s with one bit, 4 s + 2 t with two, where levels are 2
  // s - 1, 2 s + t - 1.5.
  QUEST_DEVICE float level_unit() const { return has_second_plane() ? 0.5f : 1.0f; }

  // 32 channels of the tokens of a tile. Behind the last block there is
  // something else, and the query is zero.
  QUEST_DEVICE void add_block(const char* block, const uint32_t (&query)[4],
                              int32_t (&products)[2][4]) const {
    const int column = lane_index() % 4;
    const HalfVector bits = pair_at(block, lane_index() / 4);
    HalfVector more = bits;
    if (has_second_plane()) more = pair_at(block + layout_.second_plane, lane_index() / 4);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      uint32_t levels = rotate_right(more.words[n], column - 1), mask = 0x02020202u;
      if (has_second_plane()) {
        levels = (levels & 0xaaaaaaaau) | (rotate_right(bits.words[n], column - 2) & 0x55555555u);
        mask = 0x06060606u;
      }
      multiply_bytes(products[n], query, levels & mask, levels >> 4 & mask);
    }
  }

  const ScoreCall& p_;
  const Summaries& s_;
  int row_;
  int kv_head_;
  SketchRow layout_;
  char* codes_;  // int8 [padded heads, code_stride]
  Head* heads_;  // [padded heads]
  float* scratch_;
};

}  // namespace cuda
}  // namespace quest
