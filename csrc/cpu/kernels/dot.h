// Dot products of tiles of rows with a few queries: what scoring and attention logits are made of.
#pragma once

#include "cpu/kernels/vec.h"

namespace quest {
namespace QUEST_ISA {

// How rows of T are multiplied: widened to float32. `Span` is kStep elements of a row in
// registers.
template <class T>
struct Dot {
  using Element = T;
  using Query = float;
  using Span = Pair;
  static constexpr int kStep = kPairWidth;

  static QUEST_INLINE Span load(const T* p) {
    const Pair x = load_pair(p);
    return {load_once(x.lo), load_once(x.hi)};
  }
  static QUEST_INLINE Span load(const T* p, int n) { return load_pair(p, n); }
  static QUEST_INLINE Span load_query(const float* q) {
    return {load_once(quest::QUEST_ISA::load(q)), load_once(quest::QUEST_ISA::load(q + kWidth))};
  }
  static QUEST_INLINE V accumulate(V sum, const Span& row, const Span& query) {
    return fma(row.hi, query.hi, fma(row.lo, query.lo, sum));
  }
  // query [dim rounded up to kStep] = row [dim], zero behind it.
  static void prepare(const T* row, int dim, float* query) {
    for (int i = 0; i < dim; i += kStep) {
      const Pair x = i + kStep <= dim ? load_pair(row + i) : load_pair(row + i, dim - i);
      store(query + i, x.lo);
      store(query + i + kWidth, x.hi);
    }
  }
  // The same from float32 values in order.
  static void prepare_floats(const float* row, int dim, float* query) {
    for (int i = 0; i < dim; i += kStep) {
      for (int j = 0; j < kStep; ++j) query[i + pair_lane<T>(j)] = i + j < dim ? row[i + j] : 0;
    }
  }
};

// out [dim] = the float32 values of a row of T, in order.
template <class T>
void widen_row(const T* row, int dim, float* out) {
  float lanes[kPairWidth];
  for (int i = 0; i < dim; i += kPairWidth) {
    const int n = i + kPairWidth <= dim ? kPairWidth : dim - i;
    const Pair x = n == kPairWidth ? load_pair(row + i) : load_pair(row + i, n);
    store(lanes, x.lo);
    store(lanes + kWidth, x.hi);
    for (int j = 0; j < n; ++j) out[i + j] = lanes[pair_lane<T>(j)];
  }
}

#if QUEST_LEVEL == 3
// bfloat16 pairs multiplied exactly and added in float32 (vdpbf16ps).
template <>
struct Dot<BFloat16> {
  using Element = BFloat16;
  using Query = BFloat16;
  using Span = __m512i;
  static constexpr int kStep = 32;

  static QUEST_INLINE Span load(const BFloat16* p) { return _mm512_loadu_si512(p); }
  static QUEST_INLINE Span load(const BFloat16* p, int n) { return load_words(p, n); }
  static QUEST_INLINE Span load_query(const BFloat16* q) { return _mm512_loadu_si512(q); }
  static QUEST_INLINE V accumulate(V sum, Span row, Span query) {
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)row, (__m512bh)query)};
  }
  static void prepare(const BFloat16* row, int dim, BFloat16* query) {
    for (int i = 0; i < dim; i += kStep) {
      const Span x = i + kStep <= dim ? load(row + i) : load(row + i, dim - i);
      _mm512_storeu_si512(query + i, x);
    }
  }
  static void prepare_floats(const float* row, int dim, BFloat16* query) {
    for (int i = 0; i < dim; i += kWidth) {
      const V x = {_mm512_maskz_loadu_ps(lanes_below(dim - i), row + i)};
      store_as(query + i, x);
    }
    for (int i = (dim + kWidth - 1) / kWidth * kWidth; i % kStep; ++i) query[i].bits = 0;
  }
};
#endif

// out[r * num_heads + h] = rows[r] . query[h], for kTileSize / kHeads rows.
template <class D, int kHeads>
QUEST_INLINE void dot_tile(const typename D::Element* const* rows, const typename D::Query* query,
                           int query_stride, int dim, V* out) {
  constexpr int kRows = kTileSize / kHeads;
  V sums[kTileSize];
  QUEST_UNROLL
  for (int i = 0; i < kTileSize; ++i) sums[i] = zero();
  int d = 0;
  for (; d + D::kStep <= dim; d += D::kStep) {
    // In registers is what there is less of: rows or queries.
    if (kRows <= kHeads) {
      typename D::Span row[kRows];
      QUEST_UNROLL
      for (int r = 0; r < kRows; ++r) row[r] = D::load(rows[r] + d);
      QUEST_UNROLL
      for (int h = 0; h < kHeads; ++h) {
        const typename D::Span q = D::load_query(query + h * query_stride + d);
        QUEST_UNROLL
        for (int r = 0; r < kRows; ++r) {
          sums[r * kHeads + h] = D::accumulate(sums[r * kHeads + h], row[r], q);
        }
      }
    } else {
      typename D::Span q[kHeads];
      QUEST_UNROLL
      for (int h = 0; h < kHeads; ++h) q[h] = D::load_query(query + h * query_stride + d);
      QUEST_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const typename D::Span row = D::load(rows[r] + d);
        QUEST_UNROLL
        for (int h = 0; h < kHeads; ++h) {
          sums[r * kHeads + h] = D::accumulate(sums[r * kHeads + h], row, q[h]);
        }
      }
    }
  }
  if (d < dim) {
    QUEST_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const typename D::Span row = D::load(rows[r] + d, dim - d);
      QUEST_UNROLL
      for (int h = 0; h < kHeads; ++h) {
        sums[r * kHeads + h] =
            D::accumulate(sums[r * kHeads + h], row, D::load_query(query + h * query_stride + d));
      }
    }
  }
  QUEST_UNROLL
  for (int i = 0; i < kTileSize / kWidth; ++i) out[i] = reduce_rows(sums + i * kWidth);
}

}  // namespace QUEST_ISA
}  // namespace quest
