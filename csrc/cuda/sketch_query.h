// A query as page sketches are multiplied with it: in 16 bits, which the products are exact for.
// Weights of the bits of keys are planes of bits themselves, so that a matrix instruction counts
// what 16 tokens share with 8 of them; weights of the mean are two bytes each.
#pragma once

#include "cuda/sketch_row.h"

namespace quest {
namespace cuda {

constexpr int kPlanes = 16;
constexpr int kBlockChannels = 128;  // of a matrix instruction

QUEST_BOTH int sketch_blocks(int head_dim) {
  return (head_dim + kBlockChannels - 1) / kBlockChannels;
}

// In units of log2, the estimate of a token is
// offset + mean_step * scale of the mean * (codes . mean) + scale of the token * step * (2 * bits -
// total), where a second plane of the sketch counts half.
struct SketchQuery {
  uint32_t* planes;  // [blocks of channels, kPlanes, 4]: words of 32 channels in the order of
                     // channel_at
  uint32_t* mean;    // [head_dim / 8, 4]: the high bytes of 8 channels, the low bytes
  float offset;
  float mean_step;
  float step;
  int32_t total;
};

// The channel of bit `bit` of word `word` of a block: bits of the same 8 channels are a byte of a
// sketch, and load_transposed brings bytes 2 * word, 2 * word + 1 and those 8 behind them.
QUEST_DEVICE int channel_at(int block, int word, int bit) {
  const int byte = 2 * word + bit / 8 % 2 + bit / 16 * 8;
  return block * kBlockChannels + byte * 8 + bit % 8;
}

// All queries of a CTA, in shared memory.
template <class T>
class SketchQueries {
 public:
  QUEST_DEVICE SketchQueries(const ScoreCall& p, uint32_t* memory)
      : p_(p), head_dim_(p.summaries.head_dim), memory_(memory) {}

  QUEST_BOTH static int num_words(int head_dim) {
    return sketch_blocks(head_dim) * kPlanes * 4 + head_dim / 2 + 4;
  }

  // The query that is the mean of heads [first, first + num_heads) as number `index`; for a whole
  // warp.
  QUEST_DEVICE void prepare(int index, int row, int first, int num_heads,
                            const SketchChannels& channels) {
    constexpr float kLog2E = 1.44269504088896341f;
    constexpr int kMaxWords = kMaxHeadDim / 32;
    const float factor = divide(multiply(p_.scale, kLog2E), static_cast<float>(num_heads));
    float of_bits[kMaxWords], of_mean[kMaxWords];
    float offset = 0, most_of_bits = 0, most_of_mean = 0;
    bool is_finite = true;
#pragma unroll
    for (int i = 0; i < kMaxWords; ++i) {
      const int d = channel_at(i / 4, i % 4, lane_index());
      of_bits[i] = of_mean[i] = 0;
      if (d >= head_dim_) continue;
      float q = 0;
      for (int h = first; h < first + num_heads; ++h) {
        q += to_float(query_of<T>(p_.query, p_.rows, row, h)[d]);
      }
      q = multiply(q, factor);
      offset = multiply_add(q, channels.centre[d], offset);
      of_mean[i] = multiply(q, channels.mean_scale[d]);
      of_bits[i] = multiply(q, channels.scale[d]);
      is_finite = is_finite && fabsf(of_mean[i]) < kInfinity && fabsf(of_bits[i]) < kInfinity;
      most_of_bits = fmaxf(most_of_bits, fabsf(of_bits[i]));
      most_of_mean = fmaxf(most_of_mean, fabsf(of_mean[i]));
    }
    offset = sum_of_warp(offset, 32);
    is_finite = ballot(!is_finite) == 0 && fabsf(offset) < kInfinity;
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      most_of_bits = fmaxf(most_of_bits, shuffle_xor(most_of_bits, lanes));
      most_of_mean = fmaxf(most_of_mean, shuffle_xor(most_of_mean, lanes));
    }
    SketchQuery query = at(index);
    query.step = fmaxf(divide(most_of_bits, 32767.0f), 1e-30f);
    query.mean_step = fmaxf(divide(most_of_mean, kMaxMeanWeight), 1e-30f);
    query.total = 0;
#pragma unroll
    for (int i = 0; i < kMaxWords; ++i) {
      if (i / 4 >= sketch_blocks(head_dim_)) break;
      const int weight = is_finite ? nearest_int(divide(of_bits[i], query.step)) : 0;
      query.total += weight;
      uint32_t mine = 0;
#pragma unroll
      for (int plane = 0; plane < kPlanes; ++plane) {
        const uint32_t word = ballot(weight >> plane & 1);
        if (lane_index() == plane) mine = word;
      }
      if (lane_index() < kPlanes) {
        query.planes[(i / 4 * kPlanes + lane_index()) * 4 + i % 4] = mine;
      }
      const int d = channel_at(i / 4, i % 4, lane_index());
      if (d >= head_dim_) continue;
      const int of_channel = is_finite ? nearest_int(divide(of_mean[i], query.mean_step)) : 0;
      const int low = ((of_channel + 128) & 255) - 128;
      char* bytes = reinterpret_cast<char*>(query.mean + d / 8 * 4) + d % 8;
      bytes[0] = static_cast<char>((of_channel - low) / 256);
      bytes[8] = static_cast<char>(low);
    }
    for (int lanes = 16; lanes > 0; lanes /= 2) query.total += shuffle_xor(query.total, lanes);
    if (lane_index() == 0) {
      const bool has_two = p_.summaries.rows.format.sketch_bits == 2;
      uint32_t* constants = query.mean + head_dim_ / 2;
      constants[0] = is_finite ? as_bits(offset) : 0x7fc00000u;
      constants[1] = as_bits(query.mean_step);
      // Levels of a channel: 2 b - 1 with one bit, 2 b + c - 1.5 with two.
      constants[2] = as_bits(has_two ? multiply(query.step, 0.5f) : query.step);
      constants[3] = static_cast<uint32_t>(has_two ? 3 * query.total : query.total);
    }
  }

  QUEST_DEVICE SketchQuery load(int index) const {
    SketchQuery query = at(index);
    const uint32_t* constants = query.mean + head_dim_ / 2;
    query.offset = as_float(constants[0]);
    query.mean_step = as_float(constants[1]);
    query.step = as_float(constants[2]);
    query.total = static_cast<int32_t>(constants[3]);
    return query;
  }

 private:
  static constexpr float kMaxMeanWeight = 32639;  // 127 * 257: both bytes are signed

  QUEST_DEVICE SketchQuery at(int index) const {
    SketchQuery query;
    query.planes = memory_ + index * num_words(head_dim_);
    query.mean = query.planes + sketch_blocks(head_dim_) * kPlanes * 4;
    return query;
  }

  const ScoreCall& p_;
  int head_dim_;
  uint32_t* memory_;
};

}  // namespace cuda
}  // namespace quest
