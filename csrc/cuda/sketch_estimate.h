// What page sketches and a query have in common: by a warp, for two pages at a time, of which each
// lane has one token at a time.
#pragma once

#include "cuda/sketch_query.h"

namespace quest {
namespace cuda {

// Rows of whole vectors of 16 bytes, as load_transposed wants them.
QUEST_BOTH int64_t sketch_slot_bytes(const Summaries& s) {
  return (s.rows.row_bytes + 15) / 16 * 16;
}

class SketchEstimator {
 public:
  QUEST_DEVICE explicit SketchEstimator(const Summaries& s)
      : s_(s), layout_(sketch_layout(s)), slot_bytes_(static_cast<int>(sketch_slot_bytes(s))) {
    second_ = lane_index() >> 1 & 1;
    token_ = 2 * (lane_index() >> 2) + (lane_index() & 1);
  }

  // Which page of a pair this lane has a token of, and which token of a tile.
  QUEST_DEVICE int second() const { return second_; }
  QUEST_DEVICE int token() const { return token_; }

  // Which of the pages of a step this lane has the score of.
  template <int kPairs>
  QUEST_DEVICE static int pair_of_result() {
    return kPairs == 1 ? 0 : lane_index() >> 3;
  }

  // Of pages whose rows are in slots one after the other, `count` of them: bit 8 * pair + tile of
  // `live` says whether this lane's token counts. The result is of page index_of_result.
  template <int kPairs>
  QUEST_DEVICE float score(const SketchQuery& query, const char* rows, int count,
                           uint32_t live) const {
    const int last = count - 1;
    const auto slot = [&](int index) { return rows + minimum(index, last) * slot_bytes_; };
    int means[kPairs];
    dot_means<kPairs>(query, slot, means);
    float tops[kPairs], sums[kPairs];
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      const char* mine = slot(2 * pair + second_);
      const Scales scales = scales_of(mine);
      const float step = multiply(query.step, scales.tokens);
      float top = -kInfinity, sum = 0;
#pragma unroll 1
      for (int first = 0; first < s_.page_size; first += kSketchTile) {
        const int bits = count_bits(query, slot(2 * pair), slot(2 * pair + 1), first);
        const int t = first + token_;
        const int code = t < s_.page_size ? static_cast<uint8_t>(mine[layout_.codes + t]) : 0;
        float x = multiply(multiply(static_cast<float>(bits), step), static_cast<float>(code));
        if (code == kSketchNotFinite && scales.mean < 0) x = as_float(0x7fc00000u);
        if (!(live >> (8 * pair + first / kSketchTile) & 1)) x = -kInfinity;
        if (first == 0) {
          top = fmaxf(x, -kInfinity);
          sum = x != x ? x : x > -kInfinity;
        } else {
          const float higher = fmaxf(top, x), shift = higher == -kInfinity ? 0 : higher;
          sum = multiply_add(sum, power_of_2(top - shift), power_of_2(x - shift));
          top = higher;
        }
      }
      tops[pair] = top;
      sums[pair] = sum;
    }
    return reduce<kPairs>(query, slot, means, tops, sums);
  }

 private:
  struct Scales {
    float mean;  // below zero: a token is not finite
    float tokens;
  };
  QUEST_DEVICE Scales scales_of(const char* row) const {
    return *reinterpret_cast<const Scales*>(row + layout_.scales);
  }

  // Of this lane's page of each pair: this lane's part of codes . weights.
  template <int kPairs, class Slot>
  QUEST_DEVICE void dot_means(const SketchQuery& query, const Slot& slot,
                              int (&means)[kPairs]) const {
    int high[kPairs], low[kPairs];
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) high[pair] = low[pair] = 0;
#pragma unroll 1
    for (int piece = token_; piece < layout_.num_bytes; piece += kSketchTile) {
      const Vector weights = *reinterpret_cast<const Vector*>(query.mean + 4 * piece);
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
        const HalfVector codes = *reinterpret_cast<const HalfVector*>(slot(2 * pair + second_) +
                                                                      layout_.mean + 8 * piece);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          high[pair] = dot_bytes(codes.words[i], weights.words[i], high[pair]);
          low[pair] = dot_bytes(codes.words[i], weights.words[2 + i], low[pair]);
        }
      }
    }
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) means[pair] = 256 * high[pair] + low[pair];
  }

  // Of this lane's token of a tile of a page or of the one behind it, `other`: the sum over its
  // bits in units of half a step.
  QUEST_DEVICE int count_bits(const SketchQuery& query, const char* page, const char* other,
                              int first) const {
    const int lane = lane_index();
    // Of tokens 2 * (lane / 4) and the next, in both pages: planes of the query 2 * (lane % 4) and
    // the next, and those 8 behind them.
    int sums[4] = {0, 0, 0, 0};
#pragma unroll 1
    for (int i = 0; i < s_.rows.format.sketch_bits; ++i) {
      int shared[2][2][4] = {};
      const int tile = i * layout_.plane + first * layout_.num_bytes;
#pragma unroll 1
      for (int block = 0; block < sketch_blocks(s_.head_dim); ++block) {
        uint32_t bits[2][2];
        load_bits(page + tile, other + tile, first, block, bits);
        const uint32_t* planes = query.planes + block * kPlanes * 4 + lane;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          multiply_bits(shared[j][0], bits[j][0], bits[j][1], planes[0]);
          multiply_bits(shared[j][1], bits[j][0], bits[j][1], planes[kPlanes * 2]);
        }
      }
      // The last plane is that of the sign.
      const int factor = 1 << lane % 4 * 2, last = lane % 4 == 3 ? -512 : 512;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          const int (&low)[4] = shared[j][0], (&high)[4] = shared[j][1];
          const int sum =
              low[2 * odd] + 2 * low[2 * odd + 1] + 256 * high[2 * odd] + last * high[2 * odd + 1];
          sums[2 * j + odd] = 2 * sums[2 * j + odd] + factor * sum;
        }
      }
    }
    // Over the lanes with the same tokens; each keeps one of them.
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      const int mine = second_ ? sums[2 + odd] : sums[odd];
      sums[odd] = mine + shuffle_xor(second_ ? sums[odd] : sums[2 + odd], 2);
    }
    const int mine = token_ % 2 ? sums[1] : sums[0];
    return 2 * (mine + shuffle_xor(token_ % 2 ? sums[0] : sums[1], 1)) - query.total;
  }

  // 32 channels (channel_at) of tokens 2 * (lane / 4) and the next of both tiles.
  QUEST_DEVICE void load_bits(const char* page, const char* other, int first, int block,
                              uint32_t (&bits)[2][2]) const {
    const int lane = lane_index(), last = layout_.num_bytes - 1;
    const int width = minimum(kSketchTile, s_.page_size - first);
    if (width == kSketchTile && layout_.plane % 16 == 0) {
      // Beyond the last byte there are no weights.
      const int byte = minimum(16 * block + lane % 16, last);
      uint32_t x[4];
      load_transposed((lane < 16 ? page : other) + byte * kSketchTile, x);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        bits[j][0] = even_bytes(x[2 * j], x[2 * j + 1]);
        bits[j][1] = odd_bytes(x[2 * j], x[2 * j + 1]);
      }
      return;
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        const int token = minimum(lane / 4 * 2 + odd, width - 1);
        bits[j][odd] = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int byte = minimum(channel_at(block, lane % 4, 8 * i) / 8, last);
          const char x = (j ? other : page)[byte * width + token];
          bits[j][odd] |= static_cast<uint32_t>(static_cast<uint8_t>(x)) << 8 * i;
        }
      }
    }
  }

  // Over the lanes of the pages; x of pair pair_of_result is what this lane gets.
  template <class X>
  QUEST_DEVICE static X sum_of_page(const X (&x)[1]) {
    X sum = x[0];
    sum += shuffle_xor(sum, 16);
    sum += shuffle_xor(sum, 8);
    sum += shuffle_xor(sum, 4);
    return sum + shuffle_xor(sum, 1);
  }
  template <class X>
  QUEST_DEVICE static X sum_of_page(const X (&x)[4]) {
    const bool upper = lane_index() & 16, odd = lane_index() & 8;
    const X a = (upper ? x[2] : x[0]) + shuffle_xor(upper ? x[0] : x[2], 16);
    const X b = (upper ? x[3] : x[1]) + shuffle_xor(upper ? x[1] : x[3], 16);
    X sum = (odd ? b : a) + shuffle_xor(odd ? a : b, 8);
    sum += shuffle_xor(sum, 4);
    return sum + shuffle_xor(sum, 1);
  }

  template <int kPairs, class Slot>
  QUEST_DEVICE float reduce(const SketchQuery& query, const Slot& slot, const int (&means)[kPairs],
                            float (&tops)[kPairs], float (&sums)[kPairs]) const {
    constexpr float kLn2 = 0.693147180559945f;
    float top = -kInfinity;
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      float highest = tops[pair];
#pragma unroll
      for (int lanes = 16; lanes > 0; lanes /= 2) {
        if (lanes != 2) highest = fmaxf(highest, shuffle_xor(highest, lanes));
      }
      const float shift = highest == -kInfinity ? 0 : highest;
      sums[pair] = multiply(sums[pair], power_of_2(tops[pair] - shift));
      if (pair == pair_of_result<kPairs>()) top = highest;
    }
    const float sum = sum_of_page(sums);
    const float mean = static_cast<float>(sum_of_page(means));
    const float scale = fabsf(scales_of(slot(2 * pair_of_result<kPairs>() + second_)).mean);
    const float shared = multiply_add(multiply(query.mean_step, scale), mean, query.offset);
    if (sum == 0) return -kInfinity;
    return multiply(shared + top, kLn2) + natural_log(sum);
  }

  const Summaries& s_;
  SketchLayout layout_;
  int slot_bytes_;
  int second_;
  int token_;
};

}  // namespace cuda
}  // namespace quest
