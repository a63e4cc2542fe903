// Products of a few rows with packed panels of columns: what prefill attention is made of.
//
// A word is what one lane multiplies in a step: a float32, or (vdpbf16ps) two bfloat16. A panel is
// kPanelWidth columns of the right matrix, [steps, kPanelWidth] words; the rows of the left matrix
// are words in order.
#pragma once

#include "cpu/kernels/dot.h"
#include "cpu/kernels/value.h"

namespace quest {
namespace QUEST_ISA {

// Sums that fit the registers beside a row of a panel.
constexpr int kProductRows = 6;
constexpr int kPanelVectors = QUEST_LEVEL == 0 || QUEST_LEVEL == 1 ? 2 : 4;
constexpr int kPanelWidth = kPanelVectors * kWidth;

template <class T>
struct Product {
  using Word = float;
  static constexpr int kDepth = 1;  // elements of a word
  using Operand = V;

  static QUEST_INLINE Operand load(const Word* p) { return quest::QUEST_ISA::load(p); }
  static QUEST_INLINE Operand broadcast(const Word* p) { return set1(*p); }
  static QUEST_INLINE V add(V sum, Operand x, Operand y) { return fma(x, y, sum); }

  // A vector of weights, as the left matrix has them.
  static QUEST_INLINE void store_weights(Word* p, V weights) { store(p, weights); }
  // A word of values, 0 where its weight is.
  static QUEST_INLINE Word where(Word weight, Word value) { return weight == 0 ? 0 : value; }
  // kPairWidth columns of a value row: two vectors of words. `odd`: adds NaN where not finite.
  static QUEST_INLINE void pack_pair(const T* row, const T*, int columns, Word* out, V* odd) {
    const Pair x = columns >= kPairWidth ? load_pair(row) : load_pair(row, columns);
    *odd = fma(x.hi, zero(), fma(x.lo, zero(), *odd));
    store(out, x.lo);
    store(out + kWidth, x.hi);
  }
};

#if QUEST_LEVEL == 3
template <>
struct Product<BFloat16> {
  using Word = uint32_t;
  static constexpr int kDepth = 2;
  using Operand = __m512i;

  static QUEST_INLINE Operand load(const Word* p) { return _mm512_loadu_si512(p); }
  static QUEST_INLINE Operand broadcast(const Word* p) {
    return _mm512_set1_epi32(static_cast<int32_t>(*p));
  }
  static QUEST_INLINE V add(V sum, Operand x, Operand y) {
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)x, (__m512bh)y)};
  }

  static QUEST_INLINE void store_weights(Word* p, V weights) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(weights.v));
  }
  static QUEST_INLINE Word where(Word weight, Word value) {
    return value & ((weight & 0xffff ? 0xffff : 0) | (weight >> 16 ? 0xffff0000 : 0));
  }
  // Of two rows, in the order of Values<BFloat16>::lane.
  static QUEST_INLINE void pack_pair(const BFloat16* row, const BFloat16* next, int columns,
                                     Word* out, V* odd) {
    const __m512i x = load_words(row, columns < 32 ? columns : 32);
    const __m512i y = load_words(next, columns < 32 ? columns : 32);
    const Pair a = widen(x), b = widen(y);
    *odd = fma(a.hi, zero(), fma(a.lo, zero(), *odd));
    *odd = fma(b.hi, zero(), fma(b.lo, zero(), *odd));
    _mm512_storeu_si512(out, _mm512_unpacklo_epi16(x, y));
    _mm512_storeu_si512(out + kWidth, _mm512_unpackhi_epi16(x, y));
  }
};
#endif

// sums = rows [kRows, steps] of words * a panel, its first kVectors vectors.
template <class P, int kRows, int kVectors>
QUEST_INLINE void multiply(const typename P::Word* rows, int64_t row_stride,
                           const typename P::Word* panel, int64_t steps,
                           V (&sums)[kRows][kVectors]) {
  _Pragma("GCC unroll 24") for (int i = 0; i < kRows * kVectors; ++i)
      sums[i / kVectors][i % kVectors] = zero();
  for (int64_t s = 0; s < steps; ++s) {
    typename P::Operand columns[kVectors];
    QUEST_UNROLL
    for (int v = 0; v < kVectors; ++v) columns[v] = P::load(panel + s * kPanelWidth + v * kWidth);
    QUEST_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const typename P::Operand x = P::broadcast(rows + r * row_stride + s);
      QUEST_UNROLL
      for (int v = 0; v < kVectors; ++v) sums[r][v] = P::add(sums[r][v], x, columns[v]);
    }
  }
}

}  // namespace QUEST_ISA
}  // namespace quest
