// Page summaries: elementwise minimum and maximum of the keys of a page, as they are or as int8;
// sketches are in sketch_rows.cpp.
//
// Keys are compared as integers in the order of the floats, which needs no widening. A zero is
// written as +0: the same keys give the same bits, whatever the order they are read in.
#include "cpu/kernels/dot.h"
#include "cpu/kernels/sketch.h"
#include "params.h"

namespace quest {
namespace QUEST_ISA {
namespace {

// kBytes of columns of all the rows.
template <class Key, int kBytes>
void reduce_columns(const char* rows, int64_t row_bytes, int num_rows, char* minimum,
                    char* maximum) {
  typedef Key Keys __attribute__((vector_size(kBytes)));
  constexpr int kSignShift = 8 * sizeof(Key) - 1;
  constexpr Key kMagnitude = static_cast<Key>((1ull << kSignShift) - 1);
  Keys low, high;
  memcpy(&low, rows, kBytes);
  low ^= (low >> kSignShift) & kMagnitude;
  high = low;
  for (int r = 1; r < num_rows; ++r) {
    Keys x;
    memcpy(&x, rows + r * row_bytes, kBytes);
    x ^= (x >> kSignShift) & kMagnitude;
    low = x < low ? x : low;
    high = x > high ? x : high;
  }
  // The key of -0 is -1.
  low = low == -1 ? low + 1 : low;
  high = high == -1 ? high + 1 : high;
  low ^= (low >> kSignShift) & kMagnitude;
  high ^= (high >> kSignShift) & kMagnitude;
  memcpy(minimum, &low, kBytes);
  memcpy(maximum, &high, kBytes);
}

template <class Key, int kBytes>
void reduce_row_of(const char* rows, int64_t row_bytes, int num_rows, int size, char* minimum,
                   char* maximum) {
  int i = 0;
  for (; i + kBytes <= size; i += kBytes) {
    reduce_columns<Key, kBytes>(rows + i, row_bytes, num_rows, minimum + i, maximum + i);
  }
  if (i < size) {
    // The rest, together with columns done before.
    i = size - kBytes;
    reduce_columns<Key, kBytes>(rows + i, row_bytes, num_rows, minimum + i, maximum + i);
  }
}

// summary [2, head_dim]
template <class Key>
void reduce_page(const PageSummaryParams& p, int64_t page, Key* summary) {
  const char* rows = reinterpret_cast<const char*>(static_cast<const Key*>(p.key) +
                                                   page * p.page_size * p.key_stride);
  const int64_t row_bytes = p.key_stride * sizeof(Key);
  const int size = p.head_dim * static_cast<int>(sizeof(Key));
  char* minimum = reinterpret_cast<char*>(summary);
  char* maximum = reinterpret_cast<char*>(summary + p.head_dim);
  constexpr int kVectorBytes = kWidth * 4;
  if (size >= kVectorBytes) {
    reduce_row_of<Key, kVectorBytes>(rows, row_bytes, p.page_size, size, minimum, maximum);
  } else {
    reduce_row_of<Key, 16>(rows, row_bytes, p.page_size, size, minimum, maximum);
  }
}

// Minimum and maximum of a page as floats, [2, head_dim].
template <class T, class Key>
void float_bounds(const PageSummaryParams& p, int64_t page, float* bounds) {
  Key summary[2 * kMaxHeadDim];
  reduce_page(p, page, summary);
  widen_row(reinterpret_cast<const T*>(summary), 2 * p.head_dim, bounds);
}

float magnitude(float low, float high) {
  const float a = low < 0 ? -low : low, b = high < 0 ? -high : high;
  return a > b || a != a ? a : b;
}

// Scales stay far from the ends of float32, and no channel gets less than 1/1024 of the largest.
constexpr float kSmallestScale = 1e-20f, kLargestScale = 1e20f, kSmallestPageScale = 1e-15f;

template <class T, class Key>
void scale_channels_of(const PageSummaryParams& p) {
  float bounds[2 * kMaxHeadDim];
  for (int d = 0; d < p.head_dim; ++d) p.channel_scale[d] = 0;
  float top = 0;
  int64_t previous = -1;
  for (int64_t i = 0; i < kScalePages; ++i) {
    const int64_t page = p.first_page + i * (p.last_page - p.first_page) / kScalePages;
    if (page == previous) continue;
    previous = page;
    float_bounds<T, Key>(p, page, bounds);
    for (int d = 0; d < p.head_dim; ++d) {
      const float size = magnitude(bounds[d], bounds[p.head_dim + d]);
      // NaN and infinity say nothing about the others.
      if (!(size > p.channel_scale[d] && size < kInfinity)) continue;
      p.channel_scale[d] = size;
      top = size > top ? size : top;
    }
  }
  for (int d = 0; d < p.head_dim; ++d) {
    float scale = p.channel_scale[d];
    scale = scale > top * 0x1p-10f ? scale : top * 0x1p-10f;
    scale = scale > kSmallestScale ? scale : kSmallestScale;
    p.channel_scale[d] = scale < kLargestScale ? scale : kLargestScale;
  }
}

// Rounded outward: a bound that is not the product of its factors is never too tight. 126 leaves
// room for the rounding of the factors themselves. A page with a NaN or infinity has scale NaN.
template <class T, class Key>
void quantise_page(const PageSummaryParams& p, int64_t page, char* row) {
  const int head_dim = p.head_dim;
  float bounds[2 * kMaxHeadDim];
  float_bounds<T, Key>(p, page, bounds);
  float largest = 0;
  for (int d = 0; d < head_dim; ++d) {
    const float size = magnitude(bounds[d], bounds[head_dim + d]) / p.channel_scale[d];
    largest = size > largest || size != size ? size : largest;
    if (largest != largest) break;
  }
  memset(row, 0, int8_row_bytes(head_dim));
  float page_scale = largest / 126.0f;
  page_scale =
      page_scale > kSmallestPageScale || page_scale != page_scale ? page_scale : kSmallestPageScale;
  const bool is_finite = page_scale < kInfinity;
  if (!is_finite) page_scale = bit_cast<float>(0x7fc00000);
  memcpy(row + 2 * head_dim, &page_scale, sizeof(page_scale));
  if (!is_finite) return;
  for (int d = 0; d < head_dim; ++d) {
    const float scale = page_scale * p.channel_scale[d];
    const float low = bounds[d], high = bounds[head_dim + d];
    float minimum = __builtin_floorf(low / scale), maximum = __builtin_ceilf(high / scale);
    if (minimum * scale > low) minimum -= 1;
    if (maximum * scale < high) maximum += 1;
    row[d] = static_cast<char>(static_cast<int8_t>(minimum));
    row[head_dim + d] = static_cast<char>(static_cast<int8_t>(maximum));
  }
}

constexpr int kMaxRowBytes = 2 * kMaxPageSize * kMaxHeadDim / 8 + kMaxHeadDim + kMaxPageSize + 8;
static_assert(kMaxRowBytes >= 2 * kMaxHeadDim * 4, "room for bounds in float32 as well");

// The summary of a page to `row`; returns its bytes.
template <class T, class Key>
int64_t summarise_page(const PageSummaryParams& p, int64_t page, char* row) {
  if (p.kind == SummaryKind::kMinMaxInt8) {
    quantise_page<T, Key>(p, page, row);
    return int8_row_bytes(p.head_dim);
  }
  if (p.kind == SummaryKind::kSketch) {
    sketch_page(p, page, row);
    return sketch_row_bytes(p.head_dim, p.page_size, p.sketch_bits);
  }
  reduce_page(p, page, reinterpret_cast<Key*>(row));
  return 2 * p.head_dim * sizeof(Key);
}

template <class Key>
char* stored_row(const PageSummaryParams& p, int64_t page) {
  const int64_t size = p.kind == SummaryKind::kMinMax ? sizeof(Key) : 1;
  return static_cast<char*>(p.page_summary) + page * p.summary_stride * size;
}

template <class T, class Key>
void summarise_pages_of(const PageSummaryParams& p) {
  for (int64_t page = p.first_page; page < p.last_page; ++page) {
    summarise_page<T, Key>(p, page, stored_row<Key>(p, page));
  }
}

template <class T, class Key>
bool pages_are_current_of(const PageSummaryParams& p) {
  alignas(64) char row[kMaxRowBytes];
  for (int64_t page = p.first_page; page < p.last_page; ++page) {
    const int64_t bytes = summarise_page<T, Key>(p, page, row);
    if (memcmp(row, stored_row<Key>(p, page), bytes) != 0) return false;
  }
  return true;
}

}  // namespace

void scale_channels(const PageSummaryParams& p) {
  if (p.kind == SummaryKind::kSketch) return scale_sketch_channels(p);
  switch (p.dtype) {
    case DType::kFloat32:
      return scale_channels_of<float, int32_t>(p);
    case DType::kBFloat16:
      return scale_channels_of<BFloat16, int16_t>(p);
    case DType::kFloat16:
      return scale_channels_of<Float16, int16_t>(p);
  }
}

void summarise_pages(const PageSummaryParams& p) {
  switch (p.dtype) {
    case DType::kFloat32:
      return summarise_pages_of<float, int32_t>(p);
    case DType::kBFloat16:
      return summarise_pages_of<BFloat16, int16_t>(p);
    case DType::kFloat16:
      return summarise_pages_of<Float16, int16_t>(p);
  }
}

bool pages_are_current(const PageSummaryParams& p) {
  switch (p.dtype) {
    case DType::kFloat32:
      return pages_are_current_of<float, int32_t>(p);
    case DType::kBFloat16:
      return pages_are_current_of<BFloat16, int16_t>(p);
    case DType::kFloat16:
      return pages_are_current_of<Float16, int16_t>(p);
  }
  return false;
}

}  // namespace QUEST_ISA
}  // namespace quest
