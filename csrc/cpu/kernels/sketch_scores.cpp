// Scores of page sketches: log of the sum of exp over the tokens of a page, their products with the
// query being estimated. The products are integer arithmetic: weights of the bits have 12 bits,
// those of the mean 16.
#include "cpu/kernels/dot.h"
#include "cpu/kernels/lookup.h"
#include "cpu/kernels/sketch.h"

namespace quest {
namespace QUEST_ISA {
namespace {

constexpr int kFetchBytes = 6144;
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

float smaller(float a, float b) { return a < b ? a : b; }
float larger(float a, float b) { return a > b ? a : b; }

// Tables of weights [head_dim]: entries count from the smallest sum of the 4 channels.
void prepare_tables(const float* weights, int head_dim, int sketch_bits, QueryWeights& out) {
  const int num_tables = head_dim / 4;
  float lowest = 0, range = 0, widest = 0, total = 0;
  for (int g = 0; g < num_tables; ++g) {
    float low = 0, high = 0;
    for (int i = 0; i < 4; ++i) {
      low += smaller(weights[4 * g + i], 0);
      high += larger(weights[4 * g + i], 0);
    }
    lowest += low;
    total += low + high;
    range += high - low;
    widest = larger(widest, high - low);
  }
  // Rounding adds at most half a unit per table.
  const float room = static_cast<float>(kMaxTableSum - num_tables);
  const float step = larger(larger(range / room, widest / kMaxEntry), 1e-30f), inverse = 1 / step;
  uint16_t entries[2 * kMaxSignBytes][16];
  for (int g = 0; g < num_tables; ++g) {
    float low = 0;
    for (int i = 0; i < 4; ++i) low += smaller(weights[4 * g + i], 0);
    float sums[16] = {-low};
    for (int i = 0; i < 4; ++i) {
      for (int n = 0; n < 1 << i; ++n) sums[(1 << i) + n] = sums[n] + weights[4 * g + i];
    }
    for (int n = 0; n < 16; ++n) {
      const int32_t entry = static_cast<int32_t>(larger(sums[n], 0) * inverse + 0.5f);
      entries[g][n] = static_cast<uint16_t>(entry < kMaxEntry ? entry : kMaxEntry);
    }
  }
  out.tables.prepare(entries, head_dim / 8);
  // Levels of a channel: 2 b - 1 with one bit, 2 b + c - 1.5 with two.
  out.step = step;
  out.bias = sketch_bits == 1 ? 2 * lowest - total : 3 * lowest - 1.5f * total;
}

void prepare_mean(const float* weights, int head_dim, QueryWeights& out) {
  float widest = 0;
  for (int d = 0; d < head_dim; ++d) {
    widest = larger(widest, larger(weights[d], -weights[d]));
  }
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
  float of_mean[kMaxHeadDim], of_bits[kMaxHeadDim], largest = 0;
  out.offset = 0;
  for (int d = 0; d < p.head_dim; ++d) {
    const float x = query[d] * factor;
    out.offset += x * centre[d];
    of_mean[d] = x * mean_scale[d];
    of_bits[d] = x * scale[d];
    // NaN and infinity stay.
    largest += (of_mean[d] - of_mean[d]) + (of_bits[d] - of_bits[d]);
  }
  if (largest != 0 || out.offset - out.offset != 0) {
    out.offset = bit_cast<float>(0x7fc00000);
    memset(of_mean, 0, sizeof(of_mean));
    memset(of_bits, 0, sizeof(of_bits));
  }
  prepare_tables(of_bits, p.head_dim, p.sketch_bits, out);
  prepare_mean(of_mean, p.head_dim, out);
}

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

// Tokens that do not count get a logit of -inf, those that are not finite NaN.
void mark_tokens(const ScoreParams& p, const uint8_t* codes, bool is_odd, const uint8_t* live,
                 float* logits) {
  for (int t = 0; t < p.page_size; ++t) {
    if (is_odd && codes[t] == kSketchNotFinite) logits[t] = bit_cast<float>(0x7fc00000);
    if (live && !live[t]) logits[t] = -kInfinity;
  }
}

// Logits of the tokens of a page, without what all of them share. live [page_size] or nullptr.
template <int kHeadDim, int kBits>
QUEST_INLINE void estimate_tokens(const Rows<kHeadDim, kBits>& rows, const QueryWeights& query,
                                  const char* row, const uint8_t* live, float* logits) {
  constexpr int kVectors = 16 / kWidth;
  const SketchLayout layout = rows.layout();
  const uint8_t* planes = reinterpret_cast<const uint8_t*>(row);
  float scales[2];
  memcpy(scales, row + layout.scales, sizeof(scales));
  const int num_bytes = rows.head_dim() / 8, page_size = rows.page_size();
  const V step = set1(query.step * scales[1]), bias = set1(query.bias * scales[1]);
  for (int first = 0; first < page_size; first += 16) {
    const int width = page_size - first < 16 ? page_size - first : 16;
    Sixteen sums, codes;
    const uint8_t* bits = planes + first * num_bytes;
    sum_signs<kHeadDim / 8>(query.tables, bits, num_bytes, width, sums);
    if (rows.bits() == 2) {
      Sixteen second;
      sum_signs<kHeadDim / 8>(query.tables, bits + layout.plane, num_bytes, width, second);
      for (int i = 0; i < kVectors; ++i) sums[i] = fma(sums[i], set1(2.0f), second[i]);
    } else {
      for (int i = 0; i < kVectors; ++i) sums[i] = sums[i] + sums[i];
    }
    // A tile of 8 reads the scales behind the codes as well.
    load_codes(planes + layout.codes + first, codes);
    for (int i = 0; i < kVectors; ++i) {
      store(logits + first + i * kWidth, codes[i] * fma(sums[i], step, bias));
    }
    for (int t = width; t < 16; ++t) logits[first + t] = -kInfinity;
  }
  if (__builtin_expect(live != nullptr || scales[0] < 0, 0)) {
    mark_tokens(rows.p, planes + layout.codes, scales[0] < 0, live, logits);
  }
}

// Scores of kWidth pages, the last of which may be repeated. Step by step for all of them: a page
// is one long chain of instructions.
template <int kHeadDim, int kBits>
QUEST_INLINE V score_tile(const Rows<kHeadDim, kBits>& rows, const QueryWeights& query,
                          int64_t first, const uint8_t* live) {
  const ScoreParams& p = rows.p;
  const SketchLayout layout = rows.layout();
  const int bytes = layout.scales + 8, fetch = kFetchBytes / bytes;
  const int num_vectors = rows.num_vectors(), page_size = rows.page_size();
  alignas(64) float logits[kWidth * (kHeadDim > 0 ? kSketchTile : kMaxPageSize)];
  V means[kWidth], tops[kWidth], sums[kWidth];
  float factors[kWidth];
  const int64_t last = p.last_page - 1;
  for (int r = 0; r < kWidth; ++r) {
    const int64_t page = first + r < last ? first + r : last;
    const char* row = rows.row(page);
    prefetch(rows.row(page + fetch < last ? page + fetch : last), bytes);
    const int8_t* codes = reinterpret_cast<const int8_t*>(row + layout.mean);
    means[r] = dot_codes(codes, query.mean_weights, rows.head_dim());
    memcpy(&factors[r], row + layout.scales, sizeof(float));
    factors[r] = (factors[r] < 0 ? -factors[r] : factors[r]) * query.mean_step;
    estimate_tokens(rows, query, row, live ? live + page * page_size : nullptr,
                    logits + r * num_vectors * kWidth);
  }
  for (int r = 0; r < kWidth; ++r) {
    tops[r] = set1(-kInfinity);
    for (int i = 0; i < num_vectors; ++i) {
      // NaN does not count here.
      tops[r] = max(load(logits + (r * num_vectors + i) * kWidth), tops[r]);
    }
  }
  const V largest = largest_of_rows(tops);
  float shifts[kWidth];
  store(shifts, max(largest, set1(-3e38f)));
  for (int r = 0; r < kWidth; ++r) {
    const V shift = set1(shifts[r]);
    sums[r] = zero();
    for (int i = 0; i < num_vectors; ++i) {
      sums[r] = sums[r] + exp2(load(logits + (r * num_vectors + i) * kWidth) - shift);
    }
  }
  constexpr float kLn2 = 0.693147180559945f;
  const V shared = fma(reduce_rows(means), load(factors), set1(query.offset));
  const V of_tokens = reduce_rows(sums);
  // log would lose a NaN.
  const V is_nan = of_tokens - of_tokens;
  return fma(shared + largest, set1(kLn2), log(of_tokens)) + is_nan;
}

template <int kHeadDim, int kBits>
void score_query(const ScoreParams& p, const QueryWeights& query, int head) {
  const bool is_own = p.group_reduce == GroupReduce::kNone;
  const bool is_first = head == 0 || p.group_reduce != GroupReduce::kMax;
  const uint8_t* live = p.live ? p.live + (is_own ? head * p.live_stride : 0) : nullptr;
  float* out = p.scores + (is_own ? head * p.scores_stride : 0);
  const Rows<kHeadDim, kBits> rows = {p};
  for (int64_t page = p.first_page; page < p.last_page; page += kWidth) {
    float scores[kWidth];
    store(scores, score_tile(rows, query, page, live));
    const int64_t rest = p.last_page - page;
    const int count = rest < kWidth ? static_cast<int>(rest) : kWidth;
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
