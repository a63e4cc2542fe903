// Attention of one group of query heads over a list of tokens of their KV head.
//
// Tokens are taken in spans: the logits of a span, then their softmax, then its values, with a
// running maximum and sum from span to span. Heads are taken 4, 2 or 1 at a time. Each pass over
// the keys or values of a span fetches rows that come later (fetch_rows.h).
#include "cpu/kernels/dot.h"
#include "cpu/kernels/fetch_rows.h"
#include "cpu/kernels/value.h"
#include "params.h"

namespace quest {
namespace QUEST_ISA {
namespace {

// Tokens whose values are added to one set of columns before the next set.
constexpr int kValueTokens = 32;

alignas(64) const uint16_t kZeroRow[kMaxHeadDim] = {};

// logits [size rounded up to a tile, kHeads], -inf behind the span, in units of log2.
template <class T, int kHeads>
void compute_logits(const AttendParams& p, const Span& span, const Pass<T>& keys, int first_head,
                    float* logits) {
  using D = Dot<T>;
  constexpr int kRows = kTileSize / kHeads;
  alignas(64) typename D::Query query[kHeads * kMaxHeadDim];
  for (int h = 0; h < kHeads; ++h) {
    D::prepare(static_cast<const T*>(p.query) + (first_head + h) * p.query_stride, p.head_dim,
               query + h * kMaxHeadDim);
  }
  const V scale = set1(p.scale_log2);
  for (int t = 0; t < span.size; t += kRows) {
    if (!span.is_fetched) {
      for (int r = 0; r < kRows; ++r) keys.fetch(t + r);
    }
    const T* rows[kRows];
    QUEST_UNROLL
    for (int r = 0; r < kRows; ++r) rows[r] = keys[t + r < span.size ? t + r : t];
    V tile[kTileSize / kWidth];
    dot_tile<D, kHeads>(rows, query, kMaxHeadDim, p.head_dim, tile);
    for (int i = 0; i < kTileSize / kWidth; ++i)
      store(logits + t * kHeads + i * kWidth, tile[i] * scale);
  }
  const int end = (span.size + kRows - 1) / kRows * kRows * kHeads;
  for (int i = span.size * kHeads; i < end; ++i) logits[i] = -kInfinity;
}

// Turns the logits of a span into weights relative to the new maxima, and brings maxima, sums and
// the values summed so far up to date with them.
template <class T, int kHeads>
void apply_softmax(const AttendParams& p, const Span& span, int first_head, const float* logits,
                   typename Values<T>::Weight* weights) {
  constexpr int kRows = kTileSize / kHeads;
  const int count = (span.size + kRows - 1) / kRows * kTileSize;
  V top = set1(-kInfinity);
  for (int i = 0; i < count; i += kWidth) top = max(load(logits + i), top);
  float tops[kWidth], shifts[kWidth], factors[kWidth];
  store(tops, top);
  for (int h = 0; h < kHeads; ++h) {
    float maximum = p.maxima[first_head + h];
    factors[h] = maximum;
    for (int i = h; i < kWidth; i += kHeads) maximum = tops[i] > maximum ? tops[i] : maximum;
    p.maxima[first_head + h] = maximum;
    // -inf - -inf would be NaN: only logits of -inf so far, whose weight is 0.
    const float shift = maximum == -kInfinity ? 0 : maximum;
    for (int i = h; i < kWidth; i += kHeads) shifts[i] = shift;
  }
  for (int i = kHeads; i < kWidth; ++i) factors[i] = 0;
  const V shift = load(shifts);
  store(factors, exp2(load(factors) - shift));

  V sum = zero();
  for (int i = 0; i < count; i += kWidth) {
    const V weight = exp2(load(logits + i) - shift);
    sum = sum + weight;
    Values<T>::template store_weights<kHeads>(weights + i / Values<T>::kTokens, weight);
  }
  float sums[kWidth];
  store(sums, sum);
  for (int h = 0; h < kHeads; ++h) {
    float total = p.sums[first_head + h] * factors[h];
    for (int i = h; i < kWidth; i += kHeads) total += sums[i];
    p.sums[first_head + h] = total;
    if (factors[h] == 1) continue;
    float* row = p.values + (first_head + h) * p.values_stride;
    for (int d = 0; d < p.values_stride; d += kWidth)
      store(row + d, load(row + d) * set1(factors[h]));
  }
}

// Adds the columns [column, column + kPairs pairs) of the values of tokens [begin, end) of a span.
template <class T, int kHeads, int kPairs, bool kPartial>
void add_columns(const AttendParams& p, const Pass<T>& values, Fetches<T>& fetches, int first_head,
                 int begin, int end, int column, const typename Values<T>::Weight* weights) {
  constexpr int kTokens = Values<T>::kTokens;
  float* out = p.values + first_head * p.values_stride + column;
  V sums[kHeads][kPairs][2];
  QUEST_UNROLL
  for (int h = 0; h < kHeads; ++h) {
    QUEST_UNROLL
    for (int c = 0; c < 2 * kPairs; ++c) sums[h][c / 2][c % 2] = zero();
  }
  for (int t = begin; t < end;) {
    fetches.advance();
    const int stop = t + kFetchStep < end ? t + kFetchStep : end;
    const typename Values<T>::Weight* step = weights + t / kTokens * kHeads;
    QUEST_UNROLL_4
    for (; t < stop; t += kTokens, step += kHeads) {
      const T* row = values[t] + column;
      // Not the row behind the span: its weight is 0, but it may hold infinities.
      const T* second = t + 1 < end ? values[t + 1] + column : reinterpret_cast<const T*>(kZeroRow);
      Values<T>::template add<kHeads, kPairs, kPartial>(sums, row, second, p.value_dim - column,
                                                        step);
    }
  }
  // Added to the total at the end only: rounding grows with the length of a chain of additions.
  QUEST_UNROLL
  for (int h = 0; h < kHeads; ++h) {
    QUEST_UNROLL
    for (int c = 0; c < 2 * kPairs; ++c) {
      float* total = out + h * p.values_stride + c * kWidth;
      store(total, load(total) + sums[h][c / 2][c % 2]);
    }
  }
}

template <class T, int kHeads>
void add_values(const AttendParams& p, const Span& span, const Pass<T>& values, int first_head,
                const typename Values<T>::Weight* weights) {
  constexpr int kPairs = kValuePairs(kHeads), kColumns = kPairs * kPairWidth;
  const int rest = p.value_dim % kColumns;
  const int num_passes = p.value_dim / kColumns + (rest + kPairWidth - 1) / kPairWidth;
  Fetches<T> fetches(span, values, num_passes);
  for (int t = 0; t < span.size; t += kValueTokens) {
    const int end = t + kValueTokens < span.size ? t + kValueTokens : span.size;
    int d = 0;
    for (; d + kColumns <= p.value_dim; d += kColumns) {
      add_columns<T, kHeads, kPairs, false>(p, values, fetches, first_head, t, end, d, weights);
    }
    for (; d + kPairWidth <= p.value_dim; d += kPairWidth) {
      add_columns<T, kHeads, 1, false>(p, values, fetches, first_head, t, end, d, weights);
    }
    if (d < p.value_dim)
      add_columns<T, kHeads, 1, true>(p, values, fetches, first_head, t, end, d, weights);
  }
}

template <class T, int kHeads>
void attend_heads(const AttendParams& p, const Span& span, const Passes<T>& passes,
                  int first_head) {
  alignas(64) float logits[kSpan * kHeads + kTileSize];
  alignas(64) typename Values<T>::Weight weights[kSpan * kHeads + kTileSize];
  compute_logits<T, kHeads>(p, span, passes.keys, first_head, logits);
  apply_softmax<T, kHeads>(p, span, first_head, logits, weights);
  add_values<T, kHeads>(p, span, passes.values, first_head, weights);
}

template <class T>
void attend_rows(const AttendParams& p) {
  for (int h = 0; h < p.num_heads; ++h) {
    p.maxima[h] = -kInfinity;
    p.sums[h] = 0;
    memset(p.values + h * p.values_stride, 0, p.values_stride * sizeof(float));
  }
  Passes<T> passes;
  for (int first = 0; first < p.num_tokens; first += kSpan) {
    const int rest = p.num_tokens - first;
    Span span = {p.tokens + first, rest < kSpan ? rest : kSpan, false, rest <= kSpan && p.is_last};
    passes.find(p, span);
    if (first == 0 && p.is_first) passes.keys.begin();
    for (int h = 0; h < p.num_heads;) {
      if (p.num_heads - h >= 4) {
        attend_heads<T, 4>(p, span, passes, h);
        h += 4;
      } else if (p.num_heads - h >= 2) {
        attend_heads<T, 2>(p, span, passes, h);
        h += 2;
      } else {
        attend_heads<T, 1>(p, span, passes, h);
        h += 1;
      }
      span.is_fetched = true;
    }
  }
  for (int h = 0; h < p.num_heads; ++h)
    sort_columns<T>(p.values + h * p.values_stride, p.value_dim);
}

}  // namespace

void attend(const AttendParams& p) {
  switch (p.dtype) {
    case DType::kFloat32:
      return attend_rows<float>(p);
    case DType::kBFloat16:
      return attend_rows<BFloat16>(p);
    case DType::kFloat16:
      return attend_rows<Float16>(p);
  }
}

}  // namespace QUEST_ISA
}  // namespace quest
