// Weighted sums of value rows.
#pragma once

#include "cpu/kernels/vec.h"

namespace quest {
namespace QUEST_ISA {

// Value columns are summed kPairWidth at a time. weights: [tokens, kHeads] probabilities, made from
// vectors of float32 probabilities by store_weights.
template <class T>
struct Values {
  using Weight = float;
  static constexpr int kTokens = 1;  // a step of the sum

  // Accumulator lane of value column i of a pair.
  static constexpr int lane(int i) { return pair_lane<T>(i); }

  template <int kHeads>
  static QUEST_INLINE void store_weights(Weight* weights, V probabilities) {
    store(weights, probabilities);
  }

  template <int kHeads, int kPairs, bool kPartial>
  static QUEST_INLINE void add(V (&sums)[kHeads][kPairs][2], const T* row, const T*, int columns,
                               const Weight* weights) {
    QUEST_UNROLL
    for (int c = 0; c < kPairs; ++c) {
      const Pair x = kPartial ? load_pair(row, columns) : load_pair(row + c * kPairWidth);
      QUEST_UNROLL
      for (int h = 0; h < kHeads; ++h) {
        const V w = set1(weights[h]);
        sums[h][c][0] = fma(x.lo, w, sums[h][c][0]);
        sums[h][c][1] = fma(x.hi, w, sums[h][c][1]);
      }
    }
  }
};

#if QUEST_LEVEL == 3
// Two tokens a step: vdpbf16ps on probabilities rounded to bfloat16.
template <>
struct Values<BFloat16> {
  using Weight = uint32_t;  // probabilities of two tokens, [tokens / 2, kHeads]
  static constexpr int kTokens = 2;

  // Columns of two tokens are interleaved within 128-bit lanes of 8.
  static constexpr int lane(int i) { return i % 8 / 4 * 16 + i / 8 * 4 + i % 4; }

  template <int kHeads>
  static QUEST_INLINE void store_weights(Weight* weights, V probabilities) {
    // [tokens, kHeads] to [tokens / 2, kHeads, 2]
    static const int32_t kOrder[3][16] = {{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
                                          {0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15},
                                          {0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15}};
    const __m512i order = _mm512_loadu_si512(kOrder[kHeads / 2]);
    const __m512 x = _mm512_permutexvar_ps(order, probabilities.v);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(weights), (__m256i)_mm512_cvtneps_pbh(x));
  }

  template <int kHeads, int kPairs, bool kPartial>
  static QUEST_INLINE void add(V (&sums)[kHeads][kPairs][2], const BFloat16* row,
                               const BFloat16* next, int columns, const Weight* weights) {
    QUEST_UNROLL
    for (int c = 0; c < kPairs; ++c) {
      const __m512i x = kPartial ? load_words(row, columns) : _mm512_loadu_si512(row + c * 32);
      const __m512i y = kPartial ? load_words(next, columns) : _mm512_loadu_si512(next + c * 32);
      const __m512i lo = _mm512_unpacklo_epi16(x, y), hi = _mm512_unpackhi_epi16(x, y);
      QUEST_UNROLL
      for (int h = 0; h < kHeads; ++h) {
        const __m512i w = _mm512_set1_epi32(static_cast<int32_t>(weights[h]));
        sums[h][c][0].v = _mm512_dpbf16_ps(sums[h][c][0].v, (__m512bh)lo, (__m512bh)w);
        sums[h][c][1].v = _mm512_dpbf16_ps(sums[h][c][1].v, (__m512bh)hi, (__m512bh)w);
      }
    }
  }
};
#endif

// Puts a row of sums, in the order of the accumulator lanes, into that of the columns.
template <class T>
void sort_columns(float* sums, int value_dim) {
  if (Values<T>::lane(1) == 1 && Values<T>::lane(4) == 4) return;
  float sorted[kPairWidth];
  for (int d = 0; d < value_dim; d += kPairWidth) {
    for (int i = 0; i < kPairWidth; ++i) sorted[i] = sums[d + Values<T>::lane(i)];
    memcpy(sums + d, sorted, sizeof(sorted));
  }
}

}  // namespace QUEST_ISA
}  // namespace quest
