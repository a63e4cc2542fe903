// Page scores: sum_d max(q_d min_d, q_d max_d) = sum_d min(q_d, 0) min_d + max(q_d, 0) max_d, one
// dot product of a summary row [minimum, maximum] with weights made of the query once. Sketches are
// in sketch_scores.cpp.
#include "cpu/kernels/dot.h"
#include "cpu/kernels/sketch.h"
#include "params.h"

namespace quest {
namespace QUEST_ISA {
namespace {

constexpr int kMaxRow = 2 * kMaxHeadDim;
constexpr int kFetchBytes = 6144;

// Adds the weights of a query head, of both halves of a row.
template <class T>
void add_weights(const ScoreParams& p, int head, float* weights) {
  float query[kMaxHeadDim];
  widen_row(static_cast<const T*>(p.query) + head * p.query_stride, p.head_dim, query);
  for (int d = 0; d < p.head_dim; ++d) {
    weights[d] += query[d] < 0 ? query[d] : 0;
    weights[p.head_dim + d] += query[d] < 0 ? 0 : query[d];  // NaN stays
  }
}

// One weight row for the whole group, in float32 precision; two accumulators a page.
template <class T>
struct GroupWeights {
  alignas(64) float weights[kMaxRow];

  void prepare(const float* row, int size) { Dot<T>::prepare_floats(row, size, weights); }
  QUEST_INLINE void add(const Pair& x, int i, V* sums) const {
    sums[0] = fma(x.lo, load(weights + i), sums[0]);
    sums[1] = fma(x.hi, load(weights + i + kWidth), sums[1]);
  }
  QUEST_INLINE void add(const T* row, int i, V* sums) const { add(load_pair(row + i), i, sums); }
  QUEST_INLINE void add(const T* row, int i, int n, V* sums) const {
    add(load_pair(row + i, n), i, sums);
  }
};

#if QUEST_LEVEL == 3
// The weights as two bfloat16 terms: 2^-17 of each is lost at most.
template <>
struct GroupWeights<BFloat16> {
  alignas(64) BFloat16 high[kMaxRow];
  alignas(64) BFloat16 low[kMaxRow];

  void prepare(const float* row, int size) {
    Dot<BFloat16>::prepare_floats(row, size, high);
    float rest[kMaxRow];
    for (int i = 0; i < size; ++i) {
      const float top = bit_cast<float>(static_cast<uint32_t>(high[i].bits) << 16);
      // inf - inf is NaN
      rest[i] = row[i] == top ? 0 : row[i] - top;
    }
    Dot<BFloat16>::prepare_floats(rest, size, low);
  }
  QUEST_INLINE void add(__m512i x, int i, V* sums) const {
    sums[0] = Dot<BFloat16>::accumulate(sums[0], x, _mm512_load_si512(high + i));
    sums[1] = Dot<BFloat16>::accumulate(sums[1], x, _mm512_load_si512(low + i));
  }
  QUEST_INLINE void add(const BFloat16* row, int i, V* sums) const {
    add(_mm512_loadu_si512(row + i), i, sums);
  }
  QUEST_INLINE void add(const BFloat16* row, int i, int n, V* sums) const {
    add(load_words(row + i, n), i, sums);
  }
};
#endif

template <class T>
const T* summary_row(const ScoreParams& p, int64_t page) {
  const int64_t last = p.last_page - 1;
  return static_cast<const T*>(p.page_summary) + (page < last ? page : last) * p.summary_stride;
}

template <class T>
int row_bytes(const ScoreParams& p) {
  return 2 * p.head_dim * static_cast<int>(sizeof(T));
}

// The score of a page, spread over the lanes of the result. A row at a time: the prefetchers of the
// CPU follow one stream, several rows side by side are slower.
template <class T>
QUEST_INLINE V score_row(const GroupWeights<T>& weights, const T* row, int size) {
  V sums[2] = {zero(), zero()};
  int i = 0;
  for (; i + kPairWidth <= size; i += kPairWidth) weights.add(row, i, sums);
  if (i < size) weights.add(row, i, size - i, sums);
  return sums[0] + sums[1];
}

template <class T>
void score_group(const ScoreParams& p) {
  float row[kMaxRow] = {};
  for (int h = 0; h < p.group_size; ++h) add_weights<T>(p, h, row);
  GroupWeights<T> weights;
  const int size = 2 * p.head_dim, bytes = row_bytes<T>(p), fetch = kFetchBytes / bytes;
  weights.prepare(row, size);
  for (int64_t page = p.first_page; page < p.last_page; page += kWidth) {
    V sums[kWidth];
    for (int r = 0; r < kWidth; ++r) {
      prefetch(summary_row<T>(p, page + r + fetch), bytes);
      sums[r] = score_row(weights, summary_row<T>(p, page + r), size);
    }
    const V scores = reduce_rows(sums);
    if (page + kWidth <= p.last_page) {
      store(p.scores + page, scores);
    } else {
      float rest[kWidth];
      store(rest, scores);
      memcpy(p.scores + page, rest, (p.last_page - page) * sizeof(float));
    }
  }
}

// Pages [page, page + count) of query heads [head, head + kHeads), one weight row each.
template <class T, int kHeads>
void score_tile(const ScoreParams& p, const typename Dot<T>::Query* weights, int64_t page,
                int count, int head) {
  constexpr int kRows = kTileSize / kHeads;
  const T* rows[kRows];
  for (int r = 0; r < kRows; ++r) rows[r] = summary_row<T>(p, page + r);
  V tile[kTileSize / kWidth];
  dot_tile<Dot<T>, kHeads>(rows, weights, kMaxRow, 2 * p.head_dim, tile);
  float scores[kTileSize];
  for (int i = 0; i < kTileSize / kWidth; ++i) store(scores + i * kWidth, tile[i]);
  for (int h = 0; h < kHeads; ++h) {
    float* out = p.scores + (head + h) * p.scores_stride + page;
    for (int r = 0; r < count; ++r) out[r] = scores[r * kHeads + h];
  }
}

template <class T, int kHeads>
void score_heads(const ScoreParams& p, int head) {
  constexpr int kRows = kTileSize / kHeads;
  alignas(64) typename Dot<T>::Query weights[kHeads * kMaxRow];
  for (int h = 0; h < kHeads; ++h) {
    float row[kMaxRow] = {};
    add_weights<T>(p, head + h, row);
    Dot<T>::prepare_floats(row, 2 * p.head_dim, weights + h * kMaxRow);
  }
  const int bytes = row_bytes<T>(p), fetch = kFetchBytes / bytes;
  for (int64_t page = p.first_page; page < p.last_page; page += kRows) {
    for (int r = 0; r < kRows; ++r) prefetch(summary_row<T>(p, page + r + fetch), bytes);
    const int64_t rest = p.last_page - page;
    score_tile<T, kHeads>(p, weights, page, rest < kRows ? static_cast<int>(rest) : kRows, head);
  }
}

template <class T>
void score_rows(const ScoreParams& p) {
  if (p.group_reduce == GroupReduce::kSum) return score_group<T>(p);
  for (int h = 0; h < p.group_size;) {
    if (p.group_size - h >= 4) {
      score_heads<T, 4>(p, h);
      h += 4;
    } else if (p.group_size - h >= 2) {
      score_heads<T, 2>(p, h);
      h += 2;
    } else {
      score_heads<T, 1>(p, h);
      h += 1;
    }
  }
}

void score_bounds(const ScoreParams& p) {
  switch (p.dtype) {
    case DType::kFloat32:
      return score_rows<float>(p);
    case DType::kBFloat16:
      return score_rows<BFloat16>(p);
    case DType::kFloat16:
      return score_rows<Float16>(p);
  }
}

}  // namespace

void score_pages(const ScoreParams& p) {
  switch (p.format.kind) {
    case SummaryKind::kMinMax:
      return score_bounds(p);
    case SummaryKind::kSketch:
      return score_sketches(p);
  }
}

}  // namespace QUEST_ISA
}  // namespace quest
