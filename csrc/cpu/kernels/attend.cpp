// Attention of one group of query heads over a list of tokens of their KV head.
//
// Tokens are taken in spans: the logits of a span, then their softmax, then its values, with a
// running maximum and sum from span to span. Heads are taken 4, 2 or 1 at a time. Each pass over
// the keys or values of a span fetches rows that come later, in this pass or the next (Stream).
#include "cpu/kernels/dot.h"
#include "cpu/kernels/value.h"
#include "params.h"

namespace quest {
namespace QUEST_ISA {
namespace {

constexpr int kSpan = 256;
// Tokens whose values are added to one set of columns before the next set.
constexpr int kValueTokens = 64;
// Rows are fetched to the L2 cache so many bytes before they are used, and from there to the L1
// cache so many tokens before.
constexpr int kFetchBytes = 16384;
constexpr int kMaxFetchTokens = 128;
constexpr int kNearTokens = 4;
// A fetch that misses the TLB stalls until the address is known: a few at once take no longer, so
// a row of every few tokens is touched that much ahead of the fetches.
constexpr int kTouchTokens = 64;
constexpr int kTouchStep = 16;
constexpr int kMemoryPage = 4096;
static_assert(kMaxFetchTokens + 2 * kTouchTokens <= kTokenPadding, "touching stays in the padding");

alignas(64) const uint16_t kZeroRow[kMaxHeadDim] = {};

// A part of AttendParams::tokens, at most kSpan.
struct Span {
  const int32_t* tokens;
  int size;
  bool is_fetched;  // into the L2 cache, by another tile of heads
  bool is_last;
};

template <class T>
struct Rows {
  const T* data;
  int64_t stride;
  int bytes;

  QUEST_INLINE const T* operator[](int32_t token) const { return data + token * stride; }
};

template <class T>
Rows<T> keys_of(const AttendParams& p) {
  return {static_cast<const T*>(p.key), p.key_stride, p.head_dim * static_cast<int>(sizeof(T))};
}

template <class T>
Rows<T> values_of(const AttendParams& p) {
  return {static_cast<const T*>(p.value), p.value_stride,
          p.value_dim * static_cast<int>(sizeof(T))};
}

// The rows of a pass over a span, followed by those of the pass behind it.
template <class T>
class Stream {
 public:
  Stream(const Span& span, const Rows<T>& rows, const Rows<T>& next_rows,
         const int32_t* next_tokens)
      : rows_(rows), next_rows_(next_rows), span_(span), next_tokens_(next_tokens) {
    const int wanted = kFetchBytes / rows.bytes;
    ahead_ = wanted < kMaxFetchTokens ? wanted : kMaxFetchTokens;
    const int tokens = kMemoryPage / rows.bytes;
    touch_step_ = tokens < kTouchStep ? tokens : kTouchStep;
  }

  // Before kCount rows from the t-th on are used: elements [begin, begin + size) of those to come.
  template <int kCount>
  QUEST_INLINE void advance(int t, int begin, int size) const {
    const int bytes = size * static_cast<int>(sizeof(T));
    for (int i = 0; i < kCount; ++i) {
      if (const T* row = (*this)[t + i + kNearTokens]) prefetch_near(row + begin, bytes);
    }
    if (span_.is_fetched) return;
    if (begin == 0 && t % kTouchTokens == 0) touch(t + ahead_ + kTouchTokens, kTouchTokens);
    for (int i = 0; i < kCount; ++i) {
      if (const T* row = (*this)[t + i + ahead_]) prefetch(row + begin, bytes);
    }
  }

  // The first rows, which no pass before has fetched.
  void begin() const {
    touch(0, ahead_ + kTouchTokens);
    for (int i = 0; i < ahead_; ++i) {
      if (const T* row = (*this)[i]) prefetch(row, rows_.bytes);
    }
  }

 private:
  QUEST_INLINE const T* operator[](int i) const {
    if (i < span_.size) return rows_[span_.tokens[i]];
    return next_tokens_ ? next_rows_[next_tokens_[i - span_.size]] : nullptr;
  }
  QUEST_INLINE void touch(int first, int count) const {
    for (int i = first; i < first + count; i += touch_step_) {
      if (const T* row = (*this)[i]) prefetch(row, 1);
      // Rows need not begin where memory pages do.
      if (const T* row = (*this)[i + touch_step_ - 1]) prefetch(end_of(row), 1);
    }
  }

  QUEST_INLINE const char* end_of(const T* row) const {
    return reinterpret_cast<const char*>(row) + rows_.bytes - 1;
  }

  Rows<T> rows_, next_rows_;
  const Span& span_;
  const int32_t* next_tokens_;  // nullptr: nothing follows
  int ahead_, touch_step_;
};

template <class T>
Stream<T> key_stream(const AttendParams& p, const Span& span) {
  return {span, keys_of<T>(p), values_of<T>(p), span.tokens};
}

template <class T>
Stream<T> value_stream(const AttendParams& p, const Span& span) {
  const int32_t* next_tokens = span.is_last ? nullptr : span.tokens + span.size;
  return {span, values_of<T>(p), keys_of<T>(p), next_tokens};
}

// logits [size rounded up to a tile, kHeads], -inf behind the span, in units of log2.
template <class T, int kHeads>
void compute_logits(const AttendParams& p, const Span& span, int first_head, float* logits) {
  using D = Dot<T>;
  constexpr int kRows = kTileSize / kHeads;
  alignas(64) typename D::Query query[kHeads * kMaxHeadDim];
  for (int h = 0; h < kHeads; ++h) {
    D::prepare(static_cast<const T*>(p.query) + (first_head + h) * p.query_stride, p.head_dim,
               query + h * kMaxHeadDim);
  }
  const Rows<T> keys = keys_of<T>(p);
  const Stream<T> stream = key_stream<T>(p, span);
  const V scale = set1(p.scale_log2);
  for (int t = 0; t < span.size; t += kRows) {
    stream.template advance<kRows>(t, 0, p.head_dim);
    const T* rows[kRows];
    QUEST_UNROLL
    for (int r = 0; r < kRows; ++r) rows[r] = keys[span.tokens[t + r]];
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
void add_columns(const AttendParams& p, const Span& span, int first_head, int begin, int end,
                 int column, const typename Values<T>::Weight* weights) {
  constexpr int kTokens = Values<T>::kTokens;
  const Rows<T> values = values_of<T>(p);
  const Stream<T> stream = value_stream<T>(p, span);
  const int width = kPartial ? p.value_dim - column : kPairs * kPairWidth;
  float* out = p.values + first_head * p.values_stride + column;
  V sums[kHeads][kPairs][2];
  QUEST_UNROLL
  for (int h = 0; h < kHeads; ++h) {
    QUEST_UNROLL
    for (int c = 0; c < 2 * kPairs; ++c) sums[h][c / 2][c % 2] = zero();
  }
  for (int t = begin; t < end; t += kTokens) {
    stream.template advance<kTokens>(t, column, width);
    const T* row = values[span.tokens[t]] + column;
    // Not the row behind the span: its weight is 0, but it may hold infinities.
    const T* second =
        t + 1 < end ? values[span.tokens[t + 1]] + column : reinterpret_cast<const T*>(kZeroRow);
    Values<T>::template add<kHeads, kPairs, kPartial>(sums, row, second, p.value_dim - column,
                                                      weights + t / kTokens * kHeads);
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
void add_values(const AttendParams& p, const Span& span, int first_head,
                const typename Values<T>::Weight* weights) {
  constexpr int kPairs = kValuePairs(kHeads);
  for (int t = 0; t < span.size; t += kValueTokens) {
    const int end = t + kValueTokens < span.size ? t + kValueTokens : span.size;
    int d = 0;
    for (; d + kPairs * kPairWidth <= p.value_dim; d += kPairs * kPairWidth) {
      add_columns<T, kHeads, kPairs, false>(p, span, first_head, t, end, d, weights);
    }
    for (; d + kPairWidth <= p.value_dim; d += kPairWidth) {
      add_columns<T, kHeads, 1, false>(p, span, first_head, t, end, d, weights);
    }
    if (d < p.value_dim) add_columns<T, kHeads, 1, true>(p, span, first_head, t, end, d, weights);
  }
}

template <class T, int kHeads>
void attend_heads(const AttendParams& p, const Span& span, int first_head) {
  alignas(64) float logits[kSpan * kHeads + kTileSize];
  alignas(64) typename Values<T>::Weight weights[kSpan * kHeads + kTileSize];
  compute_logits<T, kHeads>(p, span, first_head, logits);
  apply_softmax<T, kHeads>(p, span, first_head, logits, weights);
  add_values<T, kHeads>(p, span, first_head, weights);
}

template <class T>
void attend_rows(const AttendParams& p) {
  for (int h = 0; h < p.num_heads; ++h) {
    p.maxima[h] = -kInfinity;
    p.sums[h] = 0;
    memset(p.values + h * p.values_stride, 0, p.values_stride * sizeof(float));
  }
  for (int first = 0; first < p.num_tokens; first += kSpan) {
    const int rest = p.num_tokens - first;
    Span span = {p.tokens + first, rest < kSpan ? rest : kSpan, false, rest <= kSpan && p.is_last};
    if (first == 0 && p.is_first) key_stream<T>(p, span).begin();
    for (int h = 0; h < p.num_heads;) {
      if (p.num_heads - h >= 4) {
        attend_heads<T, 4>(p, span, h);
        h += 4;
      } else if (p.num_heads - h >= 2) {
        attend_heads<T, 2>(p, span, h);
        h += 2;
      } else {
        attend_heads<T, 1>(p, span, h);
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
