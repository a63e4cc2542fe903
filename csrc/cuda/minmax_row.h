// Rows of minima and maxima of the keys of a page; the bits are those of
// csrc/cpu/kernels/summarise.cpp.
#pragma once

#include "cuda/summary_rows.h"

namespace quest {
namespace cuda {

// Minimum and maximum of 8 channels over a page, as bits. For a whole warp: lane i has channels
// [8 * (i % width), ...), zeros beyond head_dim; width = lanes_for(head_dim / 8).
template <class T>
struct PageBounds {
  int32_t low[8];
  int32_t high[8];

  QUEST_DEVICE void read(const Summaries& s, const Update& u, int batch_row, int kv_head,
                         int64_t page, int width) {
    const int channel = lane_index() % width * 8, groups = 32 / width;
    const bool has_channels = channel < s.head_dim;
    const T* keys = cache_of<T>(u.key_cache, batch_row, kv_head) +
                    page * s.page_size * u.key_cache.token_stride + channel;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      low[i] = 0x7fffffff;
      high[i] = -0x7fffffff - 1;
    }
#pragma unroll 4
    for (int t = lane_index() / width; t < s.page_size; t += groups) {
      Eight<T> x;
      x.clear();
      if (has_channels) x.load(keys + t * u.key_cache.token_stride, u.has_aligned_keys);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int32_t key = flip_negative<T>(x.bits(i));
        low[i] = minimum(low[i], key);
        high[i] = maximum(high[i], key);
      }
    }
#pragma unroll 1
    for (int lanes = width; lanes < 32; lanes *= 2) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        low[i] = minimum(low[i], shuffle_xor(low[i], lanes));
        high[i] = maximum(high[i], shuffle_xor(high[i], lanes));
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      // The key of -0 is -1: a zero is written as +0.
      low[i] = flip_negative<T>(low[i] == -1 ? 0 : low[i]);
      high[i] = flip_negative<T>(high[i] == -1 ? 0 : high[i]);
    }
  }
};

// 16 bytes of 8 channels.
template <class T>
QUEST_DEVICE Vector packed(const int32_t (&bits)[8], int v) {
  if (sizeof(T) == 4) {
    return {{static_cast<uint32_t>(bits[4 * v % 8]), static_cast<uint32_t>(bits[4 * v % 8 + 1]),
             static_cast<uint32_t>(bits[4 * v % 8 + 2]),
             static_cast<uint32_t>(bits[4 * v % 8 + 3])}};
  }
  Vector x;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x.words[i] = (bits[2 * i] & 0xffff) | static_cast<uint32_t>(bits[2 * i + 1]) << 16;
  }
  return x;
}

// To `row`, in the dtype of the keys; 16-byte aligned.
template <class T>
QUEST_DEVICE void write_row(const Summaries& s, const PageBounds<T>& bounds, int width, char* row) {
  const int channel = lane_index() % width * 8;
  if (lane_index() >= width || channel >= s.head_dim) return;
  Vector* low = reinterpret_cast<Vector*>(row + channel * sizeof(T));
  Vector* high = low + s.head_dim * sizeof(T) / 16;
#pragma unroll
  for (int v = 0; v < static_cast<int>(sizeof(T)) / 2; ++v) {
    low[v] = packed<T>(bounds.low, v);
    high[v] = packed<T>(bounds.high, v);
  }
}

// The row of a page to `row`, in shared memory, by a whole warp.
template <class T>
QUEST_DEVICE void make_minmax_row(const Summaries& s, const Update& u, int batch_row, int kv_head,
                                  int64_t page, char* row) {
  const int width = lanes_for(s.head_dim / 8);
  PageBounds<T> bounds;
  bounds.read(s, u, batch_row, kv_head, page, width);
  sync_warp();
  write_row(s, bounds, width, row);
  sync_warp();
}

}  // namespace cuda
}  // namespace quest
