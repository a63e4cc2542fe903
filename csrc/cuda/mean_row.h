// Rows [mean, standard deviation]: the bits are those of csrc/cpu/kernels/mean_rows.cpp, where sums
// have an order and products are rounded before they are added.
#pragma once

#include "cuda/summary_state.h"

namespace quest {
namespace cuda {

// Every NaN is written as the same one.
QUEST_DEVICE void from_float_or_nan(float x, float& y) { y = x == x ? x : as_float(0x7fc00000u); }
QUEST_DEVICE void from_float_or_nan(float x, BFloat16& y) {
  from_float(x, y);
  if (x != x) y.bits = 0x7fc0;
}
QUEST_DEVICE void from_float_or_nan(float x, Float16& y) {
  from_float(x, y);
  if (x != x) y.bits = 0x7e00;
}

// The summary of a page to `row`, for a whole warp: lane i has channels [8 * (i % width), ...) of
// all tokens; width = lanes_for(head_dim / 8).
template <class T>
QUEST_DEVICE void write_mean_row(const Summaries& s, const Update& u, int batch_row, int kv_head,
                                 int64_t page, int width, char* row) {
  const int channel = lane_index() % width * 8;
  const int64_t stride = u.key_cache.token_stride;
  const T* keys =
      cache_of<T>(u.key_cache, batch_row, kv_head) + page * s.page_size * stride + channel;
  if (lane_index() >= width || channel >= s.head_dim) return;
  const float inverse = divide(1, static_cast<float>(s.page_size));
  Eight<T> x;
  x.load(keys, u.has_aligned_keys);
  // Relative to the first key, so that keys that are all the same have no deviation.
  float first[8], shift[8], sum[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    first[i] = x[i];
    shift[i] = sum[i] = 0;
  }
#pragma unroll 4
  for (int t = 0; t < s.page_size; ++t) {
    x.load(keys + t * stride, u.has_aligned_keys);
#pragma unroll
    for (int i = 0; i < 8; ++i) shift[i] += multiply(x[i] - first[i], inverse);
  }
#pragma unroll 4
  for (int t = 0; t < s.page_size; ++t) {
    x.load(keys + t * stride, u.has_aligned_keys);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float rest = (x[i] - first[i]) - shift[i];
      sum[i] += multiply(rest, rest);
    }
  }
  T* means = reinterpret_cast<T*>(row) + channel;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    from_float_or_nan(first[i] + shift[i], means[i]);
    from_float_or_nan(square_root(multiply(sum[i], inverse)), means[s.head_dim + i]);
  }
}

}  // namespace cuda
}  // namespace quest
