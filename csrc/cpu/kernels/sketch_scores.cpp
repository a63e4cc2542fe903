// Scores of page sketches: log of the sum of exp over the tokens of a page, their products with the
// query being estimated, in whole numbers. All heads are multiplied with a row once it is here.
#include "cpu/kernels/sketch.h"
#include "cpu/kernels/sketch_dot.h"

namespace quest {
namespace QUEST_ISA {
namespace {

constexpr int kFetchBytes = 6144;
// Pages that are taken step by step: a page is one long chain of instructions.
constexpr int kChunk = 16;
static_assert(kChunk % kWidth == 0, "pages come in whole vectors");
// Heads whose queries are prepared at once.
constexpr int kMaxHeads = 16;

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
  return fma({bit_cast<decltype(x.v)>(exponent)}, set1(kLn2<float>), s);
}

// kWidth bfloat16, in order.
QUEST_INLINE V load_scales(const char* scales) {
  typedef uint16_t Halves __attribute__((vector_size(2 * kWidth)));
  Halves x;
  memcpy(&x, scales, sizeof(x));
  return {bit_cast<decltype(V::v)>(__builtin_convertvector(x, Words) << 16)};
}

// What is known of a row when this is compiled; head_dim 0: nothing is.
template <int kHeadDim>
struct Rows {
  const ScoreParams& p;
  const SketchRow at;

  explicit Rows(const ScoreParams& p) : p(p), at(sketch_row(p.head_dim, p.format)) {}
  QUEST_INLINE int head_dim() const { return kHeadDim > 0 ? kHeadDim : p.head_dim; }
  QUEST_INLINE int num_blocks() const { return (head_dim() + kSketchBlock - 1) / kSketchBlock; }
  QUEST_INLINE int page_size() const { return static_cast<int>(p.format.page_size); }
  QUEST_INLINE int num_tiles() const {
    return kHeadDim > 0 ? 1 : (page_size() + kSketchTile - 1) / kSketchTile;
  }
  // Those behind the last one are the last one.
  QUEST_INLINE const char* row(int64_t page) const {
    const int64_t last = p.last_page - 1;
    return static_cast<const char*>(p.page_summary) +
           (page < last ? page : last) * p.summary_stride;
  }
};

// Of pages and heads, whole tiles of tokens each.
struct Chunk {
  alignas(64) float logits[4 * kChunk * kMaxPageSize];  // without what the tokens of a page share
  alignas(64) float means[4 * kChunk * kWidth];         // to be summed
  alignas(64) float mean_scales[kChunk];
};

template <int kHeads, int kBits, class Rows>
QUEST_INLINE void multiply_page(const Rows& rows, const SketchQuery* queries, const char* row,
                                int r, Chunk& out) {
  const int num_tiles = rows.num_tiles(), num_blocks = rows.num_blocks();
  const char* second = row + rows.at.second_plane;
  for (int i = 0; i < num_tiles; ++i) {
    const int tile = i * num_blocks * kSketchLine;
    V sums[kHeads][kSketchTile / kWidth];
    dot_tile<kHeads, kBits>(row + tile, second + tile, num_blocks, queries, sums);
    QUEST_UNROLL
    for (int v = 0; v < kSketchTile / kWidth; ++v) {
      const int first = i * kSketchTile + v * kWidth;
      const V scale = load_scales(row + rows.at.token_scales + 2 * first);
      QUEST_UNROLL
      for (int h = 0; h < kHeads; ++h) {
        const V x = fma(sums[h][v], set1(queries[h].factor), set1(queries[h].offset));
        store(out.logits + (h * kChunk + r) * num_tiles * kSketchTile + first, scale * x);
      }
    }
  }
  const int8_t* mean = reinterpret_cast<const int8_t*>(row + rows.at.mean);
  QUEST_UNROLL
  for (int h = 0; h < kHeads; ++h) {
    store(out.means + (h * kChunk + r) * kWidth, dot_mean(mean, queries[h], rows.head_dim()));
  }
  memcpy(out.mean_scales + r, row + rows.at.mean_scale, sizeof(float));
}

// Tokens that do not count get a logit of -inf. live [size] or nullptr; the others are padding.
void mark_tokens(const uint8_t* live, int size, int num_logits, float* logits) {
  uint8_t counts[kMaxPageSize] = {};
  if (live) {
    memcpy(counts, live, size);
  } else {
    memset(counts, 1, size);
  }
  for (int t = 0; t < num_logits; ++t) logits[t] = counts[t] ? logits[t] : -kInfinity;
}

// Of a head, pages [0, count), count a multiple of kWidth. logits [count, kWidth * num_vectors] are
// overwritten.
QUEST_INLINE void sum_tokens(float* logits, const float* means, const float* mean_scales,
                             float mean_factor, int count, int num_vectors, float* scores) {
  float largest[kChunk], shifts[kChunk];
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
    V sums[kWidth], products[kWidth];
    QUEST_UNROLL
    for (int lane = 0; lane < kWidth; ++lane) {
      sums[lane] = load(logits + (r + lane) * num_vectors * kWidth);
      products[lane] = load(means + (r + lane) * kWidth);
    }
    const V total = reduce_rows(sums);
    const V shared = reduce_rows(products) * (load(mean_scales + r) * set1(mean_factor));
    // Where the total is NaN the log of it need not be.
    const V rest = log(total) + (total - total);
    store(scores + r, fma(shared + load(largest + r), set1(kLn2<float>), rest));
  }
}

template <int kHeads, int kBits, class Rows>
void score_tile(const Rows& rows, const SketchQuery* queries, int head, int64_t page, int count) {
  const ScoreParams& p = rows.p;
  const int padded = (count + kWidth - 1) / kWidth * kWidth;
  const int num_logits = rows.num_tiles() * kSketchTile;
  Chunk chunk;
  for (int r = 0; r < padded; ++r) {
    if (head == 0) {
      const int fetch = kFetchBytes / rows.at.row_bytes;
      prefetch(rows.row(page + r + fetch), rows.at.row_bytes);
    }
    multiply_page<kHeads, kBits>(rows, queries, rows.row(page + r), r, chunk);
  }
  for (int h = 0; h < kHeads; ++h) {
    float* logits = chunk.logits + h * kChunk * num_logits;
    if (p.live || rows.page_size() < num_logits) {
      for (int r = 0; r < count; ++r) {
        const int64_t first = (page + r) * rows.page_size();
        const uint8_t* live = p.live ? p.live + (head + h) * p.live_stride + first : nullptr;
        mark_tokens(live, rows.page_size(), num_logits, logits + r * num_logits);
      }
    }
    float scores[kChunk];
    sum_tokens(logits, chunk.means + h * kChunk * kWidth, chunk.mean_scales, queries[h].mean_factor,
               padded, num_logits / kWidth, scores);
    memcpy(p.scores + (head + h) * p.scores_stride + page, scores, count * sizeof(float));
  }
}

template <int kBits, class Rows>
void score_heads(const Rows& rows, const SketchQuery* queries, int head, int num_heads) {
  const ScoreParams& p = rows.p;
  for (int64_t page = p.first_page; page < p.last_page; page += kChunk) {
    const int64_t rest = p.last_page - page;
    const int count = rest < kChunk ? static_cast<int>(rest) : kChunk;
    int h = 0;
    for (; h + 4 <= num_heads; h += 4) {
      score_tile<4, kBits>(rows, queries + h, head + h, page, count);
    }
    for (; h + 2 <= num_heads; h += 2) {
      score_tile<2, kBits>(rows, queries + h, head + h, page, count);
    }
    if (h < num_heads) score_tile<1, kBits>(rows, queries + h, head + h, page, count);
  }
}

template <class T, int kHeadDim>
void score_sketches_of(const ScoreParams& p) {
  const Rows<kHeadDim> rows(p);
  SketchQuery queries[kMaxHeads];
  for (int head = 0; head < p.group_size; head += kMaxHeads) {
    const int rest = p.group_size - head, num_heads = rest < kMaxHeads ? rest : kMaxHeads;
    for (int h = 0; h < num_heads; ++h) prepare_query<T>(p, head + h, queries[h]);
    rows.at.num_planes == 1 ? score_heads<1>(rows, queries, head, num_heads)
                            : score_heads<2>(rows, queries, head, num_heads);
  }
}

template <class T>
void score_sketches_of(const ScoreParams& p) {
  if (p.format.page_size == kSketchTile && p.head_dim == 128) return score_sketches_of<T, 128>(p);
  if (p.format.page_size == kSketchTile && p.head_dim == 64) return score_sketches_of<T, 64>(p);
  score_sketches_of<T, 0>(p);
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
