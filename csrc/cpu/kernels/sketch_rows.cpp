// Sketches of pages. Compiled without contraction, and sums have an order: the same keys give the
// same bits on every machine.
#include "cpu/kernels/floats8.h"
#include "cpu/kernels/sketch.h"

namespace quest {
namespace QUEST_ISA {
namespace {

constexpr int kMaxGroups = kMaxHeadDim / 8;  // channels are taken 8 at a time
constexpr float kMaxKey = 1e11f;
constexpr float kSmallestScale = 1e-12f, kLargestScale = 1e12f;

QUEST_INLINE Float8 magnitude(Float8 x) {
  return bit_cast<Float8>(bit_cast<Int8x32>(x) & 0x7fffffff);
}
// To the nearest, ties to even, below 2^22.
QUEST_INLINE Float8 nearest(Float8 x) { return (x + 12582912.0f) - 12582912.0f; }

QUEST_INLINE Float8 bounded(Float8 x) {
  x = x > kMaxKey ? all(kMaxKey) : x;
  return x < -kMaxKey ? all(-kMaxKey) : x;
}

// Bit i: x[i] >= 0 is true (-1) in lane i of `is_true`.
QUEST_INLINE uint8_t bits_of(Int8x32 is_true) {
#if QUEST_LEVEL >= 1 && QUEST_LEVEL <= 3
  return static_cast<uint8_t>(_mm256_movemask_ps((__m256)is_true));
#else
  const Int8x32 x = is_true & Int8x32{1, 2, 4, 8, 16, 32, 64, 128};
  return static_cast<uint8_t>((x[0] | x[1] | x[2] | x[3]) | (x[4] | x[5] | x[6] | x[7]));
#endif
}
QUEST_INLINE float sum_of(Float8 x) {
  return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

// The tokens of a page: which are finite, and the mean of those.
template <class T>
struct Page {
  const T* keys;
  int64_t stride;
  int num_tokens;
  int num_groups;
  bool is_finite[kMaxPageSize];
  int num_finite;
  float inverse;  // 1 / num_finite
  Float8 mean[kMaxGroups];

  Page(const PageSummaryParams& p, int64_t page)
      : keys(static_cast<const T*>(p.key) + page * p.page_size * p.key_stride),
        stride(p.key_stride),
        num_tokens(p.page_size),
        num_groups(p.head_dim / 8),
        num_finite(0) {
    for (int t = 0; t < num_tokens; ++t) {
      Int8x32 largest = {};
      for (int g = 0; g < num_groups; ++g) {
        const Int8x32 x = bit_cast<Int8x32>(magnitude(load_keys(keys + t * stride + 8 * g)));
        largest = x > largest ? x : largest;
      }
      int32_t top = 0;
      for (int i = 0; i < 8; ++i) top = largest[i] > top ? largest[i] : top;
      is_finite[t] = top < 0x7f800000;
      num_finite += is_finite[t];
    }
    inverse = 1.0f / static_cast<float>(num_finite > 0 ? num_finite : 1);
    for (int g = 0; g < num_groups; ++g) {
      Float8 sum = {};
      for (int t = 0; t < num_tokens; ++t) {
        if (is_finite[t]) sum += bounded(load_keys(keys + t * stride + 8 * g)) * inverse;
      }
      mean[g] = sum;
    }
  }

  QUEST_INLINE Float8 residual(int t, int g) const {
    return bounded(load_keys(keys + t * stride + 8 * g)) - mean[g];
  }
};

// Where the bits of a token are in a plane: byte of channels g * 8 and on at g * width.
struct Place {
  int first;
  int width;
};
QUEST_INLINE Place place_of(const PageSummaryParams& p, int t) {
  const int tile = t / kSketchTile, rest = p.page_size - tile * kSketchTile;
  return {tile * kSketchTile * (p.head_dim / 8) + t % kSketchTile,
          rest < kSketchTile ? rest : kSketchTile};
}

// The scales of the residuals of all channels.
struct Scales {
  const float* values;
  Float8 inverse[kMaxGroups];
  float sum;

  Scales(const float* scale, int num_groups) : values(scale) {
    Float8 total = {};
    for (int g = 0; g < num_groups; ++g) {
      const Float8 s = load_floats(scale + 8 * g);
      inverse[g] = 1.0f / s;
      total += s;
    }
    sum = sum_of(total);
  }
};

// Writes the bits of a token and returns its scale.
template <class T>
float sketch_token(const PageSummaryParams& p, const Page<T>& page, int t, const Scales& scales,
                   uint8_t* plane, int plane_bytes) {
  const Place place = place_of(p, t);
  uint8_t* bytes = plane + place.first;
  Float8 sum = {};
  for (int g = 0; g < page.num_groups; ++g) {
    const Float8 x = page.residual(t, g);
    bytes[g * place.width] = bits_of(x >= 0);
    sum += x * x * scales.inverse[g];
  }
  const float size = sum_of(sum);
  const float token_scale = __builtin_sqrtf(size / scales.sum);
  if (p.sketch_bits == 1) return token_scale;
  Float8 levels = {};
  for (int g = 0; g < page.num_groups; ++g) {
    const Float8 x = page.residual(t, g), s = load_floats(scales.values + 8 * g);
    const Int8x32 is_outer = magnitude(x) >= token_scale * s, is_positive = x >= 0;
    bytes[plane_bytes + g * place.width] = bits_of(is_outer == is_positive);
    levels += s * (is_outer ? all(2.25f) : all(0.25f));
  }
  return __builtin_sqrtf(size / sum_of(levels));
}

template <class T>
void write_mean(const PageSummaryParams& p, const Page<T>& page, int8_t* codes, float* page_scale) {
  const float *centre = p.channel_scale, *mean_scale = centre + p.head_dim;
  Float8 deviations[kMaxGroups], largest = {};
  for (int g = 0; g < page.num_groups; ++g) {
    deviations[g] = (page.mean[g] - load_floats(centre + 8 * g)) / load_floats(mean_scale + 8 * g);
    const Float8 size = magnitude(deviations[g]);
    largest = size > largest ? size : largest;
  }
  float top = 0;
  for (int i = 0; i < 8; ++i) top = largest[i] > top ? largest[i] : top;
  const float scale = top / 127.0f > 1e-15f ? top / 127.0f : 1e-15f;
  for (int g = 0; g < page.num_groups; ++g) {
    const Float8 code = nearest(deviations[g] / scale);
    for (int i = 0; i < 8; ++i) {
      const float x = code[i] > 127 ? 127 : code[i] < -127 ? -127 : code[i];
      codes[8 * g + i] = static_cast<int8_t>(x);
    }
  }
  *page_scale = page.num_finite == page.num_tokens ? scale : -scale;
}

template <class T>
void sketch_page_of(const PageSummaryParams& p, int64_t index, char* row) {
  const Page<T> page(p, index);
  const SketchLayout layout = sketch_layout(p.head_dim, p.page_size, p.sketch_bits);
  uint8_t* plane = reinterpret_cast<uint8_t*>(row);
  const Scales channels(p.channel_scale + 2 * p.head_dim, page.num_groups);
  float token_scales[kMaxPageSize], largest = 0;
  for (int t = 0; t < p.page_size; ++t) {
    token_scales[t] = 0;
    if (page.is_finite[t]) {
      token_scales[t] = sketch_token(p, page, t, channels, plane, layout.plane);
      largest = token_scales[t] > largest ? token_scales[t] : largest;
      continue;
    }
    const Place place = place_of(p, t);
    for (int b = 0; b < p.sketch_bits; ++b) {
      for (int g = 0; g < page.num_groups; ++g) {
        plane[b * layout.plane + place.first + g * place.width] = 255;
      }
    }
  }
  float scales[2];  // of the mean, of the tokens
  write_mean(p, page, reinterpret_cast<int8_t*>(row + layout.mean), scales);
  scales[1] = largest / 254.0f > 1e-30f ? largest / 254.0f : 1e-30f;
  for (int t = 0; t < p.page_size; ++t) {
    const float code = __builtin_rintf(token_scales[t] / scales[1]);
    row[layout.codes + t] = static_cast<char>(
        page.is_finite[t] ? static_cast<uint8_t>(code) : static_cast<uint8_t>(kSketchNotFinite));
  }
  memcpy(row + layout.scales, scales, sizeof(scales));
}

// Calls visit(page) for the pages that the scales are taken from and that have a finite token.
template <class T, class Visit>
int visit_pages(const PageSummaryParams& p, const Visit& visit) {
  int64_t previous = -1;
  int count = 0;
  for (int64_t i = 0; i < kScalePages; ++i) {
    const int64_t index = p.first_page + i * (p.last_page - p.first_page) / kScalePages;
    if (index == previous) continue;
    previous = index;
    const Page<T> page(p, index);
    if (page.num_finite == 0) continue;
    visit(page);
    ++count;
  }
  return count > 0 ? count : 1;
}

// Far from the ends of float32; no channel gets less than 1/1024 of the largest.
void bound_scales(float* scale, int size) {
  float top = 0;
  for (int d = 0; d < size; ++d) top = scale[d] > top ? scale[d] : top;
  for (int d = 0; d < size; ++d) {
    float x = scale[d] > top * 0x1p-10f ? scale[d] : top * 0x1p-10f;
    x = x > kSmallestScale ? x : kSmallestScale;
    scale[d] = x < kLargestScale ? x : kLargestScale;
  }
}

template <class T>
void scale_channels_of(const PageSummaryParams& p) {
  const int num_groups = p.head_dim / 8;
  Float8 centre[kMaxGroups] = {}, spread[kMaxGroups] = {}, deviation[kMaxGroups] = {};
  const auto add_mean = [&](const Page<T>& page) {
    for (int g = 0; g < num_groups; ++g) centre[g] += page.mean[g];
  };
  const float count = static_cast<float>(visit_pages<T>(p, add_mean));
  for (int g = 0; g < num_groups; ++g) centre[g] = centre[g] / count;
  visit_pages<T>(p, [&](const Page<T>& page) {
    for (int g = 0; g < num_groups; ++g) {
      spread[g] += magnitude(page.mean[g] - centre[g]);
      Float8 sum = {};
      for (int t = 0; t < page.num_tokens; ++t) {
        if (page.is_finite[t]) sum += magnitude(page.residual(t, g)) * page.inverse;
      }
      deviation[g] += sum;
    }
  });
  for (int g = 0; g < num_groups; ++g) {
    store_floats(p.channel_scale + 8 * g, centre[g]);
    store_floats(p.channel_scale + p.head_dim + 8 * g, spread[g] / count);
    store_floats(p.channel_scale + 2 * p.head_dim + 8 * g, deviation[g] / count);
  }
  bound_scales(p.channel_scale + p.head_dim, p.head_dim);
  bound_scales(p.channel_scale + 2 * p.head_dim, p.head_dim);
}

}  // namespace

void sketch_page(const PageSummaryParams& p, int64_t page, char* row) {
  switch (p.dtype) {
    case DType::kFloat32:
      return sketch_page_of<float>(p, page, row);
    case DType::kBFloat16:
      return sketch_page_of<BFloat16>(p, page, row);
    case DType::kFloat16:
      return sketch_page_of<Float16>(p, page, row);
  }
}

void scale_channels(const PageSummaryParams& p) {
  switch (p.dtype) {
    case DType::kFloat32:
      return scale_channels_of<float>(p);
    case DType::kBFloat16:
      return scale_channels_of<BFloat16>(p);
    case DType::kFloat16:
      return scale_channels_of<Float16>(p);
  }
}

}  // namespace QUEST_ISA
}  // namespace quest
