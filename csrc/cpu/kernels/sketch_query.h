// A query as sketches are scored with it: tables of its weights on the bits of a token, and its
// weights on the mean of a page.
#pragma once

#include "cpu/kernels/dot.h"
#include "cpu/kernels/lookup.h"
#include "params.h"

namespace quest {
namespace QUEST_ISA {

constexpr float kLog2e = 1.442695040888963f;

// Of one query, in units of log2: a token's estimate is
// offset + mean_step * page scale * (codes . mean_weights) + token scale * (bias + step * sums).
struct QueryWeights {
  SignTables tables;
  alignas(64) int16_t mean_weights[kMaxHeadDim];
  float mean_step;
  float step;
  float bias;
  float offset;
};

inline float smaller(float a, float b) { return a < b ? a : b; }
inline float larger(float a, float b) { return a > b ? a : b; }

// Bit i of n.
constexpr float kBitOf[4][16] = {{0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1},
                                 {0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1},
                                 {0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1},
                                 {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1}};

// Tables of weights [head_dim]: entries count from the smallest sum of the 4 channels.
inline void prepare_tables(const float* weights, int head_dim, int sketch_bits, QueryWeights& out) {
  const int num_tables = head_dim / 4;
  float lows[kMaxHeadDim / 4], ranges[kMaxHeadDim / 4];
  float lowest = 0, range = 0, widest = 0, total = 0;
  for (int g = 0; g < num_tables; ++g) {
    float low = 0, high = 0;
    for (int i = 0; i < 4; ++i) {
      low += smaller(weights[4 * g + i], 0);
      high += larger(weights[4 * g + i], 0);
    }
    lows[g] = low;
    ranges[g] = high - low;
    lowest += low;
    total += low + high;
  }
  for (int g = 0; g < num_tables; ++g) {
    range += ranges[g];
    widest = larger(widest, ranges[g]);
  }
  // Rounding adds at most half a unit per table.
  const float room = static_cast<float>(kMaxTableSum - num_tables);
  const float step = larger(larger(range / room, widest / kMaxEntry), 1e-30f), inverse = 1 / step;
  for (int g = 0; g < num_tables; ++g) {
    int32_t entries[16];
    for (int n = 0; n < 16; ++n) {
      float sum = -lows[g];
      for (int i = 0; i < 4; ++i) sum += weights[4 * g + i] * kBitOf[i][n];
      const int32_t entry = static_cast<int32_t>(larger(sum, 0) * inverse + 0.5f);
      entries[n] = entry < kMaxEntry ? entry : kMaxEntry;
    }
    out.tables.set(g, entries);
  }
  out.tables.complete(num_tables);
  // Levels of a channel: 2 b - 1 with one bit, 2 b + c - 1.5 with two.
  out.step = step;
  out.bias = sketch_bits == 1 ? 2 * lowest - total : 3 * lowest - 1.5f * total;
}

inline void prepare_mean(const float* weights, int head_dim, QueryWeights& out) {
  float tops[8] = {}, widest = 0;
  for (int d = 0; d < head_dim; d += 8) {
    for (int i = 0; i < 8; ++i) tops[i] = larger(tops[i], larger(weights[d + i], -weights[d + i]));
  }
  for (int i = 0; i < 8; ++i) widest = larger(widest, tops[i]);
  out.mean_step = larger(widest / 32767, 1e-30f);
  memset(out.mean_weights, 0, sizeof(out.mean_weights));
  for (int d = 0; d < head_dim; ++d) {
    out.mean_weights[d] = static_cast<int16_t>(__builtin_rintf(weights[d] / out.mean_step));
  }
}

// The mean of query heads [head, head + num_heads).
template <class T>
void prepare_query(const ScoreParams& p, int head, int num_heads, QueryWeights& out) {
  float query[kMaxHeadDim] = {}, row[kMaxHeadDim];
  for (int h = head; h < head + num_heads; ++h) {
    widen_row(static_cast<const T*>(p.query) + h * p.query_stride, p.head_dim, row);
    for (int d = 0; d < p.head_dim; ++d) query[d] += row[d];
  }
  const float *centre = p.channel_scale, *mean_scale = centre + p.head_dim;
  const float* scale = mean_scale + p.head_dim;
  const float factor = p.scale * kLog2e / static_cast<float>(num_heads);
  float of_mean[kMaxHeadDim], of_bits[kMaxHeadDim], offsets[8] = {}, odd[8] = {}, is_odd = 0;
  for (int d = 0; d < p.head_dim; d += 8) {
    for (int i = 0; i < 8; ++i) {
      const float x = query[d + i] * factor;
      const float mean = of_mean[d + i] = x * mean_scale[d + i];
      const float bits = of_bits[d + i] = x * scale[d + i];
      offsets[i] += x * centre[d + i];
      odd[i] += (mean - mean) + (bits - bits);  // NaN and infinity stay
    }
  }
  out.offset = 0;
  for (int i = 0; i < 8; ++i) {
    out.offset += offsets[i];
    is_odd += odd[i];
  }
  if (is_odd != 0 || out.offset - out.offset != 0) {
    out.offset = bit_cast<float>(0x7fc00000);
    memset(of_mean, 0, sizeof(of_mean));
    memset(of_bits, 0, sizeof(of_bits));
  }
  prepare_tables(of_bits, p.head_dim, p.sketch_bits, out);
  prepare_mean(of_mean, p.head_dim, out);
}

}  // namespace QUEST_ISA
}  // namespace quest
