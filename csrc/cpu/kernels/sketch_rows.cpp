// Sketches of pages. Compiled without contraction, and sums have an order: the same keys give the
// same bits on every machine.
#include "cpu/kernels/rotate.h"
#include "cpu/kernels/sketch.h"

namespace quest {
namespace QUEST_ISA {
namespace {

QUEST_INLINE Float8 magnitude(Float8 x) {
  return bit_cast<Float8>(bit_cast<Int8x32>(x) & 0x7fffffff);
}
// To the nearest, ties to even, below 2^22.
QUEST_INLINE Float8 nearest(Float8 x) { return (x + 12582912.0f) - 12582912.0f; }

QUEST_INLINE Float8 bounded(Float8 x, float limit) {
  x = x > limit ? all(limit) : x;
  return x < -limit ? all(-limit) : x;
}

QUEST_INLINE float sum_of(Float8 x) {
  return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}
// Of numbers that are not negative.
QUEST_INLINE float largest_of(Float8 x) {
  float top = 0;
  for (int i = 0; i < 8; ++i) top = x[i] > top ? x[i] : top;
  return top;
}
QUEST_INLINE uint32_t union_of(Int8x32 x) {
  return static_cast<uint32_t>((x[0] | x[1] | x[2] | x[3]) | (x[4] | x[5] | x[6] | x[7]));
}

// The rotated keys of a page and their mean, as it is stored.
struct Page {
  int num_tokens;
  int num_groups;
  int num_finite = 0;
  bool is_finite[kMaxPageSize];
  Float8 keys[kMaxPageSize * kMaxGroups];  // [num_tokens, num_groups]; 0: not finite
  Float8 mean_codes[kMaxGroups];
  float mean_scale;

  explicit Page(const PageSummaryParams& p)
      : num_tokens(static_cast<int>(p.format.page_size)), num_groups(p.head_dim / 8) {}
};

template <class T>
void read_page(const PageSummaryParams& p, int64_t index, Page& page) {
  const T* keys = static_cast<const T*>(p.key) + index * page.num_tokens * p.key_stride;
  for (int t = 0; t < page.num_tokens; ++t) {
    Float8* x = page.keys + t * page.num_groups;
    Int8x32 largest = {};
    for (int g = 0; g < page.num_groups; ++g) {
      const Float8 key = load_keys(keys + t * p.key_stride + 8 * g);
      const Int8x32 size = bit_cast<Int8x32>(magnitude(key));
      largest = size > largest ? size : largest;
      x[g] = bounded(key, kSketchMaxKey);
    }
    int32_t top = 0;
    for (int i = 0; i < 8; ++i) top = largest[i] > top ? largest[i] : top;
    page.is_finite[t] = top < 0x7f800000;
    page.num_finite += page.is_finite[t];
    if (page.is_finite[t]) {
      rotate(x, page.num_groups);
    } else {
      memset(x, 0, page.num_groups * sizeof(Float8));
    }
  }
}

void find_mean(Page& page) {
  const float inverse = 1.0f / static_cast<float>(page.num_finite > 0 ? page.num_finite : 1);
  Float8 mean[kMaxGroups], largest = {};
  for (int g = 0; g < page.num_groups; ++g) {
    Float8 sum = {};
    for (int t = 0; t < page.num_tokens; ++t) sum += page.keys[t * page.num_groups + g];
    mean[g] = sum * inverse;
    const Float8 size = magnitude(mean[g]);
    largest = size > largest ? size : largest;
  }
  const float scale = largest_of(largest) / 127.0f;
  page.mean_scale = scale > kSketchMinScale ? scale : kSketchMinScale;
  for (int g = 0; g < page.num_groups; ++g) {
    page.mean_codes[g] = bounded(nearest(mean[g] / page.mean_scale), 127);
  }
}

// Writes the word of each block of channels, of both planes, and returns the scale of the token.
template <int kBits>
float sketch_token(const Page& page, int t, char* first, char* second) {
  Float8 residual[kMaxGroups], sum = {};
  for (int g = 0; g < page.num_groups; ++g) {
    residual[g] = page.keys[t * page.num_groups + g] - page.mean_codes[g] * page.mean_scale;
    sum += residual[g] * residual[g];
  }
  const float square = sum_of(sum), head_dim = static_cast<float>(8 * page.num_groups);
  const float deviation = __builtin_sqrtf(square / head_dim);
  Int8x32 num_outer = {};
  for (int g = 0, block = 0; g < page.num_groups; ++block) {
    Int8x32 signs = {}, others = {};
    // Bits of the first 8 channels; those behind follow two bits higher.
    Int8x32 bit = {1, 1 << 8, 1 << 16, 1 << 24, 2, 2 << 8, 2 << 16, 2 << 24};
    for (int end = g + 4; g < end && g < page.num_groups; ++g, bit = bit << 2) {
      const Int8x32 is_positive = residual[g] >= 0;
      signs |= is_positive & bit;
      if (kBits == 2) {
        const Int8x32 is_outer = magnitude(residual[g]) >= deviation;
        others |= (is_outer == is_positive) & bit;
        num_outer -= is_outer;
      }
    }
    const uint32_t words[2] = {union_of(signs), union_of(others)};
    memcpy(first + block * kSketchLine, &words[0], 4);
    if (kBits == 2) memcpy(second + block * kSketchLine, &words[1], 4);
  }
  if (kBits == 1) return deviation;
  int count = 0;
  for (int i = 0; i < 8; ++i) count += num_outer[i];
  // Squares of levels: 2.25 of outer ones, 0.25 of others.
  return __builtin_sqrtf(square / (0.25f * head_dim + 2.0f * static_cast<float>(count)));
}

uint16_t to_bfloat16(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

void write_row(const PageSummaryParams& p, const Page& page, char* row) {
  const SketchRow at = sketch_row(p.head_dim, p.format);
  const int tile_bytes = (p.head_dim + kSketchBlock - 1) / kSketchBlock * kSketchLine;
  memset(row, 0, at.row_bytes);
  for (int t = 0; t < page.num_tokens; ++t) {
    uint16_t scale = kSketchNotFinite;
    if (page.is_finite[t]) {
      char* first = row + t / kSketchTile * tile_bytes + t % kSketchTile * 4;
      char* second = first + at.second_plane;
      scale = to_bfloat16(at.num_planes == 1 ? sketch_token<1>(page, t, first, second)
                                             : sketch_token<2>(page, t, first, second));
    }
    memcpy(row + at.token_scales + 2 * t, &scale, 2);
  }
  for (int d = 0; d < p.head_dim; ++d) {
    row[at.mean + d] = static_cast<int8_t>(page.mean_codes[d / 8][d % 8]);
  }
  memcpy(row + at.mean_scale, &page.mean_scale, 4);
}

}  // namespace

void sketch_page(const PageSummaryParams& p, int64_t index, char* row) {
  Page page(p);
  switch (p.dtype) {
    case DType::kFloat32:
      read_page<float>(p, index, page);
      break;
    case DType::kBFloat16:
      read_page<BFloat16>(p, index, page);
      break;
    case DType::kFloat16:
      read_page<Float16>(p, index, page);
      break;
  }
  find_mean(page);
  write_row(p, page, row);
}

}  // namespace QUEST_ISA
}  // namespace quest
