// Attention of many neighbouring queries of the heads that share a KV head.
//
// A row is one query of one head. Keys and values are packed a tile at a time; kProductRows rows
// at a time make logits, weights relative to a running maximum, and their sum of the values. Tiles
// begin at multiples of kPrefillTile, and what a row may not attend adds 0 to it: its bits depend
// on no other row.
#include "cpu/kernels/product.h"
#include "params.h"

namespace quest {
namespace QUEST_ISA {
namespace {

constexpr int kTile = static_cast<int>(kPrefillTile);
static_assert(kTile % kPanelWidth == 0 && kPanelWidth % kPairWidth == 0, "whole panels");

constexpr int round_up(int x, int multiple) { return (x + multiple - 1) / multiple * multiple; }

// Positions [begin, end) of a tile.
struct Span {
  int begin;
  int end;
};

template <class T>
class Prefill {
  using P = Product<T>;
  using Word = typename P::Word;
  static constexpr int kSteps = kTile / P::kDepth;  // words of a row of weights

 public:
  explicit Prefill(const PrefillParams& params)
      : p(params),
        num_rows(p.num_queries * p.num_heads),
        query_words(round_up(p.head_dim, Dot<T>::kStep) / P::kDepth),
        value_columns(round_up(p.value_dim, kPairWidth)) {
    const int rows = round_up(num_rows, kProductRows);
    float* next = p.scratch;
    const auto take = [&next](int64_t count) {
      next += count;
      return next - count;
    };
    packed_keys = reinterpret_cast<Word*>(take(kTile * query_words));
    packed_values = reinterpret_cast<Word*>(take(kSteps * round_up(value_columns, kPanelWidth)));
    live_values = reinterpret_cast<Word*>(take(kSteps * round_up(value_columns, kPanelWidth)));
    queries = reinterpret_cast<Word*>(take(static_cast<int64_t>(rows) * query_words));
    values = take(static_cast<int64_t>(rows) * value_columns);
    maxima = take(rows);
    sums = take(rows);
    for (int r = 0; r < rows; ++r) begin_row(r);
  }

  void attend() {
    int64_t first = INT32_MAX, last = 0;
    for (int r = 0; r < num_rows; ++r) {
      const Interval& own = interval(r);
      if (own.first >= own.last) continue;
      first = own.first < first ? own.first : first;
      last = own.last > last ? own.last : last;
    }
    for (tile = first / kTile * kTile; tile < last; tile += kTile) {
      const int end = static_cast<int>(last - tile < kTile ? last - tile : kTile);
      pack_keys(end);
      pack_values(end);
      for (int r = 0; r < num_rows; r += kProductRows) attend_tile(r);
    }
    for (int r = 0; r < num_rows; ++r) finish_row(r);
  }

 private:
  const Interval& interval(int row) const {
    return p.intervals[row / p.num_heads * p.interval_stride +
                       row % p.num_heads * p.interval_head_stride];
  }

  // Rows behind the last one are zeros.
  void begin_row(int row) {
    Word* const query = queries + static_cast<int64_t>(row) * query_words;
    if (row < num_rows) {
      const int64_t at =
          row / p.num_heads * p.query_stride + row % p.num_heads * p.query_head_stride;
      prepare(static_cast<const T*>(p.query) + at, query);
    } else {
      memset(query, 0, query_words * sizeof(Word));
    }
    memset(values + static_cast<int64_t>(row) * value_columns, 0, value_columns * sizeof(float));
    maxima[row] = -kInfinity;
    sums[row] = 0;
  }

  void prepare(const T* row, Word* words) const {
    Dot<T>::prepare(row, p.head_dim, reinterpret_cast<typename Dot<T>::Query*>(words));
  }

  // Keys from `end` on are not read.
  void pack_keys(int end) {
    alignas(64) Word rows[kWidth][kMaxHeadDim];
    for (int t = 0; t < kTile; t += kWidth) {
      for (int i = 0; i < kWidth; ++i) {
        if (t + i < end) {
          prepare(static_cast<const T*>(p.key) + (tile + t + i) * p.key_stride, rows[i]);
        } else {
          memset(rows[i], 0, query_words * sizeof(Word));
        }
      }
      Word* panel = packed_keys + t / kPanelWidth * kPanelWidth * query_words + t % kPanelWidth;
      for (int s = 0; s < query_words; ++s, panel += kPanelWidth) {
        QUEST_UNROLL
        for (int i = 0; i < kWidth; ++i) panel[i] = rows[i][s];
      }
    }
  }

  void pack_values(int end) {
    alignas(64) static const uint32_t kZeroRow[kMaxHeadDim] = {};
    const auto row = [&](int t) {
      return t < end ? static_cast<const T*>(p.value) + (tile + t) * p.value_stride
                     : reinterpret_cast<const T*>(kZeroRow);
    };
    V odd = zero();
    for (int s = 0; s < kSteps; ++s) {
      const T* const x = row(s * P::kDepth);
      const T* const y = row(s * P::kDepth + P::kDepth - 1);
      for (int d = 0; d < p.value_dim; d += kPairWidth) {
        const int column = d / kPanelWidth * kPanelWidth;
        Word* const out = packed_values + column * kSteps + s * kPanelWidth + (d - column);
        P::pack_pair(x + d, y + d, p.value_dim - d, out, &odd);
      }
    }
    float lanes[kWidth];
    store(lanes, odd);
    values_are_finite = true;
    for (int i = 0; i < kWidth; ++i) values_are_finite &= lanes[i] == 0;
  }

  void attend_tile(int first_row) {
    Span own[kProductRows];
    Span all = {kTile, 0};
    for (int i = 0; i < kProductRows; ++i) {
      own[i] = span_of(first_row + i);
      if (own[i].begin == own[i].end) continue;
      all.begin = own[i].begin < all.begin ? own[i].begin : all.begin;
      all.end = own[i].end > all.end ? own[i].end : all.end;
    }
    if (all.begin >= all.end) return;
    all = {all.begin / kPanelWidth * kPanelWidth, round_up(all.end, kPanelWidth)};

    alignas(64) float logits[kProductRows][kTile];
    alignas(64) Word weights[kProductRows][kSteps];
    float factors[kProductRows];
    compute_logits(first_row, all, logits);
    for (int i = 0; i < kProductRows; ++i) {
      forbid(first_row + i, own[i], all, logits[i]);
      factors[i] = make_weights(first_row + i, all, logits[i], weights[i]);
    }
    if (values_are_finite) {
      add_values<kProductRows>(first_row, all, packed_values, weights[0], factors);
      return;
    }
    // 0 * NaN is NaN: each row without the values that it may not attend.
    for (int i = 0; i < kProductRows && first_row + i < num_rows; ++i) {
      for (int column = 0; column < value_columns; column += kPanelWidth) {
        const int64_t panel = static_cast<int64_t>(column) * kSteps;
        const int width =
            value_columns - column < kPanelWidth ? value_columns - column : kPanelWidth;
        for (int s = all.begin / P::kDepth; s < all.end / P::kDepth; ++s) {
          const int64_t at = panel + s * kPanelWidth;
          for (int d = 0; d < width; ++d) {
            live_values[at + d] = P::where(weights[i][s], packed_values[at + d]);
          }
        }
      }
      add_values<1>(first_row + i, all, live_values, weights[i], factors + i);
    }
  }

  Span span_of(int row) const {
    if (row >= num_rows) return {0, 0};
    const int64_t begin = interval(row).first - tile, end = interval(row).last - tile;
    const Span span = {static_cast<int>(begin < 0       ? 0
                                        : begin < kTile ? begin
                                                        : kTile),
                       static_cast<int>(end < 0       ? 0
                                        : end < kTile ? end
                                                      : kTile)};
    return span.begin < span.end ? span : Span{0, 0};
  }

  // In units of log2.
  void compute_logits(int first_row, Span all, float (&logits)[kProductRows][kTile]) const {
    const Word* const rows = queries + static_cast<int64_t>(first_row) * query_words;
    const V scale = set1(p.scale_log2);
    for (int t = all.begin; t < all.end; t += kPanelWidth) {
      V sum[kProductRows][kPanelVectors];
      multiply<P>(rows, query_words, packed_keys + t * query_words, query_words, sum);
      for (int i = 0; i < kProductRows; ++i) {
        for (int v = 0; v < kPanelVectors; ++v)
          store(logits[i] + t + v * kWidth, sum[i][v] * scale);
      }
    }
  }

  // -inf where this row may not attend.
  void forbid(int row, Span own, Span all, float* logits) const {
    for (int t = all.begin; t < own.begin; ++t) logits[t] = -kInfinity;
    for (int t = own.begin > own.end ? own.begin : own.end; t < all.end; ++t)
      logits[t] = -kInfinity;
    const uint8_t* const mask = own.begin < own.end ? interval(row).mask : nullptr;
    if (!mask) return;
    for (int t = own.begin; t < own.end; ++t) {
      if (!mask[(tile + t) * p.mask_stride]) logits[t] = -kInfinity;
    }
  }

  // Weights relative to the new maximum. Returns the factor of what was summed so far.
  float make_weights(int row, Span all, const float* logits, Word* weights) {
    V top = set1(maxima[row]);
    for (int t = all.begin; t < all.end; t += kWidth) top = max(load(logits + t), top);
    float lanes[kWidth];
    store(lanes, top);
    float maximum = maxima[row];
    for (int i = 0; i < kWidth; ++i) maximum = lanes[i] > maximum ? lanes[i] : maximum;
    // -inf - -inf would be NaN: only logits of -inf so far, whose weight is 0.
    const float shift = maximum == -kInfinity ? 0 : maximum;
    store(lanes, exp2(set1(maxima[row] - shift)));
    const float factor = lanes[0];
    maxima[row] = maximum;
    V sum = zero();
    for (int t = all.begin; t < all.end; t += kWidth) {
      const V weight = exp2(load(logits + t) - set1(shift));
      sum = sum + weight;
      P::store_weights(weights + t / P::kDepth, weight);
    }
    store(lanes, sum);
    float total = sums[row] * factor;
    for (int i = 0; i < kWidth; ++i) total += lanes[i];
    sums[row] = total;
    return factor;
  }

  template <int kRows>
  void add_values(int first_row, Span all, const Word* panels, const Word* weights,
                  const float* factors) {
    int column = 0;
    for (; column + kPanelWidth <= value_columns; column += kPanelWidth) {
      add_columns<kRows, kPanelVectors>(first_row, column, all, panels, weights, factors);
    }
    if (column < value_columns) {
      // Of panels of two pairs there is one.
      add_columns<kRows, 2>(first_row, column, all, panels, weights, factors);
    }
  }

  template <int kRows, int kVectors>
  void add_columns(int first_row, int column, Span all, const Word* panels, const Word* weights,
                   const float* factors) {
    const int begin = all.begin / P::kDepth;
    const Word* const panel = panels + column * kSteps + begin * kPanelWidth;
    V sum[kRows][kVectors];
    multiply<P>(weights + begin, kSteps, panel, all.end / P::kDepth - begin, sum);
    for (int i = 0; i < kRows; ++i) {
      float* const out = values + static_cast<int64_t>(first_row + i) * value_columns + column;
      for (int v = 0; v < kVectors; ++v) {
        // Added to the total at the end only: rounding grows with the length of a chain.
        store(out + v * kWidth, fma(load(out + v * kWidth), set1(factors[i]), sum[i][v]));
      }
    }
  }

  void finish_row(int row) {
    float* const sum = values + static_cast<int64_t>(row) * value_columns;
    sort_columns<T>(sum, p.value_dim);
    const V inverse = set1(sums[row] == 0 ? 0 : 1 / sums[row]);
    T* const out = static_cast<T*>(p.out) + row / p.num_heads * p.out_stride +
                   row % p.num_heads * p.out_head_stride;
    for (int d = 0; d < p.value_dim; d += kWidth) {
      T some[kWidth];
      store_as(some, load(sum + d) * inverse);
      const int rest = p.value_dim - d;
      memcpy(out + d, some, (rest < kWidth ? rest : kWidth) * sizeof(T));
    }
  }

  const PrefillParams& p;
  const int num_rows;
  const int query_words;    // a row of the queries or keys
  const int value_columns;  // a row of the values, in whole pairs of vectors
  Word* packed_keys;        // [kTile / kPanelWidth, query_words, kPanelWidth]
  Word* packed_values;      // [value_columns / kPanelWidth, kSteps, kPanelWidth]
  Word* live_values;        // the same, of one row
  Word* queries;            // [rows, query_words]
  float* values;            // [rows, value_columns], sum of weight * value
  float* maxima;            // [rows], in units of log2
  float* sums;              // [rows], of weights
  int64_t tile;             // its first position
  bool values_are_finite;
};

}  // namespace

void prefill(const PrefillParams& p) {
  switch (p.dtype) {
    case DType::kFloat32:
      return Prefill<float>(p).attend();
    case DType::kBFloat16:
      return Prefill<BFloat16>(p).attend();
    case DType::kFloat16:
      return Prefill<Float16>(p).attend();
  }
}

}  // namespace QUEST_ISA
}  // namespace quest
