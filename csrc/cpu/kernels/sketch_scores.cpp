// Scores of page sketches: log of the sum of exp over the tokens of a page, their products with the
// query being estimated. The products are integer arithmetic: weights of the bits have 12 bits,
// those of the mean 16.
#include "cpu/kernels/sketch.h"
#include "cpu/kernels/sketch_query.h"

namespace quest {
namespace QUEST_ISA {
namespace {

constexpr int kFetchBytes = 6144;
// Natural log of x >= 1. Coefficients: Cephes.
QUEST_INLINE V log(V x) {
  typedef int32_t Ints __attribute__((vector_size(4 * kWidth)));
  typedef float Floats __attribute__((vector_size(4 * kWidth)));
  const Ints bits = bit_cast<Ints>(x.v);
  const Ints raised = bits - 0x3f3504f3;  // of the root of 1/2
  const Floats exponent = __builtin_convertvector(raised >> 23, Floats);
  const V f = {bit_cast<decltype(x.v)>((raised & 0x007fffff) + 0x3f3504f3)};
  const V y = f - set1(1.0f), z = y * y;
  constexpr float kCoefficients[] = {-1.1514610310e-1f, 1.1676998740e-1f,  -1.2420140846e-1f,
                                     1.4249322787e-1f,  -1.6668057665e-1f, 2.0000714765e-1f,
                                     -2.4999993993e-1f, 3.3333331174e-1f};
  V s = set1(7.0376836292e-2f);
  for (const float c : kCoefficients) s = fma(s, y, set1(c));
  s = fma(s * y, z, fma(z, set1(-0.5f), y));
  return fma({bit_cast<decltype(x.v)>(exponent)}, set1(0.693147180559945f), s);
}

// What is known of a row when this is compiled; head_dim 0: nothing is.
template <int kHeadDim, int kBits>
struct Rows {
  const ScoreParams& p;

  QUEST_INLINE int head_dim() const { return kHeadDim > 0 ? kHeadDim : p.head_dim; }
  QUEST_INLINE int page_size() const { return kHeadDim > 0 ? kSketchTile : p.page_size; }
  QUEST_INLINE int bits() const { return kHeadDim > 0 ? kBits : p.sketch_bits; }
  QUEST_INLINE SketchLayout layout() const {
    return sketch_layout(head_dim(), page_size(), bits());
  }
  QUEST_INLINE const char* row(int64_t page) const {
    return static_cast<const char*>(p.page_summary) + page * p.summary_stride;
  }
  QUEST_INLINE int num_vectors() const { return (page_size() + 15) / 16 * (16 / kWidth); }
};

// Tokens that do not count get a logit of -inf, those that are not finite NaN. live [page_size] or
// nullptr.
void mark_tokens(const ScoreParams& p, const char* row, const SketchLayout& layout,
                 const uint8_t* live, float* logits) {
  float scale;
  memcpy(&scale, row + layout.scales, sizeof(scale));
  const uint8_t* codes = reinterpret_cast<const uint8_t*>(row) + layout.codes;
  for (int t = 0; t < p.page_size; ++t) {
    if (scale < 0 && codes[t] == kSketchNotFinite) logits[t] = bit_cast<float>(0x7fc00000);
    if (live && !live[t]) logits[t] = -kInfinity;
  }
}

// Pages whose tables are read once.
constexpr int kTogether = 2;
// Pages that are taken step by step: a page is one long chain of instructions.
constexpr int kChunk = 32;
static_assert(kChunk % kWidth == 0 && kWidth % kTogether == 0, "pages come in whole vectors");

// Logits of the tokens of kTogether pages, without what all tokens of a page share.
template <int kHeadDim, int kBits>
QUEST_INLINE void estimate_tokens(const Rows<kHeadDim, kBits>& rows, const QueryWeights& query,
                                  const char* const (&row)[kTogether], float* logits) {
  const SketchLayout layout = rows.layout();
  const int num_bytes = rows.head_dim() / 8, page_size = rows.page_size();
  const int num_logits = rows.num_vectors() * kWidth;
  for (int first = 0; first < page_size; first += 16) {
    const int width = page_size - first < 16 ? page_size - first : 16;
    const uint8_t* bits[kTogether];
    Sixteen sums[kTogether], second[kTogether];
    QUEST_UNROLL
    for (int k = 0; k < kTogether; ++k) {
      bits[k] = reinterpret_cast<const uint8_t*>(row[k]) + first * num_bytes;
    }
    sum_signs<kHeadDim / 8>(query.tables, bits, num_bytes, width, sums);
    if (rows.bits() == 2) {
      QUEST_UNROLL
      for (int k = 0; k < kTogether; ++k) bits[k] += layout.plane;
      sum_signs<kHeadDim / 8>(query.tables, bits, num_bytes, width, second);
    }
    QUEST_UNROLL
    for (int k = 0; k < kTogether; ++k) {
      float* out = logits + k * num_logits + first;
      float scale;
      memcpy(&scale, row[k] + layout.scales + sizeof(float), sizeof(scale));
      const V step = set1(query.step * scale), bias = set1(query.bias * scale);
      // A tile of 8 reads the scales behind the codes as well.
      Sixteen codes;
      load_codes(reinterpret_cast<const uint8_t*>(row[k]) + layout.codes + first, codes);
      QUEST_UNROLL
      for (int i = 0; i < 16 / kWidth; ++i) {
        V sum = sums[k][i] + sums[k][i];
        if (rows.bits() == 2) sum = sum + second[k][i];
        store(out + i * kWidth, codes[i] * fma(sum, step, bias));
      }
      for (int t = width; t < 16; ++t) out[t] = -kInfinity;
    }
  }
}

// What the tokens of a page share, their product with its mean, and the logits of the tokens
// without it, for pages [first, first + count); the last page is repeated as often as needed.
template <int kHeadDim, int kBits>
QUEST_INLINE void estimate_pages(const Rows<kHeadDim, kBits>& rows, const QueryWeights& query,
                                 int64_t first, int count, const uint8_t* live, float* shared,
                                 float* logits) {
  const SketchLayout layout = rows.layout();
  const int bytes = layout.scales + 8, fetch = kFetchBytes / bytes;
  const int num_logits = rows.num_vectors() * kWidth, page_size = rows.page_size();
  const int64_t last = rows.p.last_page - 1;
  V means[kWidth];
  float factors[kWidth];
  for (int r = 0; r < count; r += kTogether) {
    const char* row[kTogether];
    bool is_odd = live != nullptr;
    QUEST_UNROLL
    for (int k = 0; k < kTogether; ++k) {
      const int64_t page = first + r + k < last ? first + r + k : last;
      const int lane = (r + k) % kWidth;
      row[k] = rows.row(page);
      prefetch(rows.row(page + fetch < last ? page + fetch : last), bytes);
      const int8_t* codes = reinterpret_cast<const int8_t*>(row[k] + layout.mean);
      means[lane] = dot_codes(codes, query.mean_weights, rows.head_dim());
      float scale;
      memcpy(&scale, row[k] + layout.scales, sizeof(scale));
      is_odd |= scale < 0;
      factors[lane] = (scale < 0 ? -scale : scale) * query.mean_step;
    }
    estimate_tokens(rows, query, row, logits + r * num_logits);
    if (__builtin_expect(is_odd, 0)) {
      for (int k = 0; k < kTogether; ++k) {
        const int64_t page = first + r + k < last ? first + r + k : last;
        mark_tokens(rows.p, row[k], layout, live ? live + page * page_size : nullptr,
                    logits + (r + k) * num_logits);
      }
    }
    if ((r + kTogether) % kWidth == 0) {
      const V product = fma(reduce_rows(means), load(factors), set1(query.offset));
      store(shared + r + kTogether - kWidth, product);
    }
  }
}

// Scores of pages [first, first + count), count a multiple of kWidth, at most kChunk.
template <int kHeadDim, int kBits>
QUEST_INLINE void score_chunk(const Rows<kHeadDim, kBits>& rows, const QueryWeights& query,
                              int64_t first, int count, const uint8_t* live, float* scores) {
  const int num_vectors = rows.num_vectors();
  alignas(64) float logits[kChunk * (kHeadDim > 0 ? kSketchTile : kMaxPageSize)];
  alignas(64) float shared[kChunk], largest[kChunk], shifts[kChunk], totals[kChunk];
  estimate_pages(rows, query, first, count, live, shared, logits);
  for (int r = 0; r < count; r += kWidth) {
    V tops[kWidth];
    QUEST_UNROLL
    for (int lane = 0; lane < kWidth; ++lane) {
      tops[lane] = set1(-kInfinity);
      for (int i = 0; i < num_vectors; ++i) {
        // NaN does not count here.
        tops[lane] = max(load(logits + ((r + lane) * num_vectors + i) * kWidth), tops[lane]);
      }
    }
    const V top = largest_of_rows(tops);
    store(largest + r, top);
    store(shifts + r, max(top, set1(-3e38f)));
  }
  // A page at a time, so that the constants of exp2 stay in registers.
  for (int r = 0; r < count; ++r) {
    float* page = logits + r * num_vectors * kWidth;
    const V shift = set1(shifts[r]);
    V sum = zero();
    for (int i = 0; i < num_vectors; ++i) sum = sum + exp2(load(page + i * kWidth) - shift);
    store(page, sum);
  }
  for (int r = 0; r < count; r += kWidth) {
    V sums[kWidth];
    QUEST_UNROLL
    for (int lane = 0; lane < kWidth; ++lane) {
      sums[lane] = load(logits + (r + lane) * num_vectors * kWidth);
    }
    store(totals + r, reduce_rows(sums));
  }
  constexpr float kLn2 = 0.693147180559945f;
  for (int r = 0; r < count; r += kWidth) {
    const V total = load(totals + r);
    // log would lose a NaN.
    const V is_nan = total - total;
    store(scores + r, fma(load(shared + r) + load(largest + r), set1(kLn2), log(total)) + is_nan);
  }
}

template <int kHeadDim, int kBits>
void score_query(const ScoreParams& p, const QueryWeights& query, int head) {
  const bool is_own = p.group_reduce == GroupReduce::kNone;
  const bool is_first = head == 0 || p.group_reduce != GroupReduce::kMax;
  const uint8_t* live = p.live ? p.live + (is_own ? head * p.live_stride : 0) : nullptr;
  float* out = p.scores + (is_own ? head * p.scores_stride : 0);
  const Rows<kHeadDim, kBits> rows = {p};
  for (int64_t page = p.first_page; page < p.last_page; page += kChunk) {
    const int64_t rest = p.last_page - page;
    const int count = rest < kChunk ? static_cast<int>(rest) : kChunk;
    float scores[kChunk];
    score_chunk(rows, query, page, (count + kWidth - 1) / kWidth * kWidth, live, scores);
    for (int r = 0; r < count; ++r) {
      float& best = out[page + r];
      // NaN stays the maximum.
      best = is_first || scores[r] > best || scores[r] != scores[r] ? scores[r] : best;
    }
  }
}

template <int kHeadDim>
void score_query_of(const ScoreParams& p, const QueryWeights& query, int head) {
  p.sketch_bits == 1 ? score_query<kHeadDim, 1>(p, query, head)
                     : score_query<kHeadDim, 2>(p, query, head);
}

template <class T>
void score_sketches_of(const ScoreParams& p) {
  const bool is_sum = p.group_reduce == GroupReduce::kSum;
  for (int head = 0; head < (is_sum ? 1 : p.group_size); ++head) {
    QueryWeights query;
    prepare_query<T>(p, head, is_sum ? p.group_size : 1, query);
    if (p.page_size == kSketchTile && p.head_dim == 128) {
      score_query_of<128>(p, query, head);
    } else if (p.page_size == kSketchTile && p.head_dim == 64) {
      score_query_of<64>(p, query, head);
    } else {
      score_query<0, 0>(p, query, head);
    }
  }
}

}  // namespace

void score_sketches(const ScoreParams& p) {
  if (p.first_page >= p.last_page) return;
  switch (p.dtype) {
    case DType::kFloat32:
      return score_sketches_of<float>(p);
    case DType::kBFloat16:
      return score_sketches_of<BFloat16>(p);
    case DType::kFloat16:
      return score_sketches_of<Float16>(p);
  }
}

}  // namespace QUEST_ISA
}  // namespace quest
