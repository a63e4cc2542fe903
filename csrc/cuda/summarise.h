// Page summaries: elementwise minimum and maximum of the keys of a page, as they are or as int8;
// the bits are those of csrc/cpu/kernels/summarise.cpp.
#pragma once

#include "cuda/summary_state.h"

namespace quest {
namespace cuda {

constexpr int kMaxRowBytes = 2 * kMaxHeadDim * 4;

QUEST_DEVICE char* row_of(const Summaries& s, int batch_row, int kv_head, int64_t page) {
  const int64_t index =
      batch_row * s.rows.batch_stride + kv_head * s.rows.head_stride + page * s.rows.page_stride;
  return static_cast<char*>(s.rows.data) + index * s.rows.element_size;
}

QUEST_DEVICE float* channel_scale_of(const Summaries& s, int batch_row, int kv_head) {
  return s.rows.channel_scale +
         (static_cast<int64_t>(batch_row) * s.num_kv_heads + kv_head) * s.rows.scale_size;
}

// Where sample i of a head is kept until the next kernel.
QUEST_DEVICE char* late_row(const Summaries& s, const Update& u, int64_t head, int i) {
  return u.late_rows + (head * kNumSamples + i) * s.rows.row_bytes;
}

// Lanes that share a row of `count` pieces: a power of two.
QUEST_BOTH int lanes_for(int count) {
  int lanes = 1;
  while (lanes < count && lanes < 32) lanes *= 2;
  return lanes;
}

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

  QUEST_DEVICE static float value(int32_t bits) {
    if (sizeof(T) == 4) return as_float(static_cast<uint32_t>(bits));
    T x;
    memcpy(&x, &bits, sizeof(T));
    return to_float(x);
  }
  // The larger magnitude of channel i; NaN if one is.
  QUEST_DEVICE float size(int i) const {
    const float a = fabsf(value(low[i])), b = fabsf(value(high[i]));
    return a > b || a != a ? a : b;
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

// As int8, rounded outward: 126 leaves room for the rounding of the factors themselves. NaN or
// infinity: the scale of the page is NaN.
template <class T>
QUEST_DEVICE void write_int8_row(const Summaries& s, const PageBounds<T>& bounds,
                                 const float* channel_scale, int width, char* row) {
  const int channel = lane_index() % width * 8;
  const bool has_channels = channel < s.head_dim;
  float most = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (!has_channels) continue;
    const float size = divide(bounds.size(i), channel_scale[channel + i]);
    most = size > most || size != size || most != most ? (most != most ? most : size) : most;
  }
  for (int lanes = width / 2; lanes > 0; lanes /= 2) {
    const float other = shuffle_xor(most, lanes);
    most = most != most ? most : other > most || other != other ? other : most;
  }
  float page_scale = divide(most, 126.0f);
  if (page_scale < 1e-15f) page_scale = 1e-15f;
  const bool is_finite = page_scale < kInfinity;
  if (lane_index() < width && has_channels) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float scale = multiply(page_scale, channel_scale[channel + i]);
      const float low = bounds.value(bounds.low[i]), high = bounds.value(bounds.high[i]);
      float least = 0, top = 0;
      if (is_finite) {
        least = round_down(divide(low, scale));
        top = round_up(divide(high, scale));
        if (multiply(least, scale) > low) least -= 1;
        if (multiply(top, scale) < high) top += 1;
      }
      row[channel + i] = static_cast<char>(static_cast<int8_t>(least));
      row[s.head_dim + channel + i] = static_cast<char>(static_cast<int8_t>(top));
    }
  }
  if (lane_index() == 0) {
    const uint32_t scale_bits = is_finite ? as_bits(page_scale) : 0x7fc00000u;
    memcpy(row + 2 * s.head_dim, &scale_bits, sizeof(scale_bits));
    for (int64_t i = 2 * s.head_dim + 4; i < s.rows.row_bytes; ++i) row[i] = 0;
  }
}

// The summary of a page to `row`, in shared memory, by a whole warp. Kinds are known when kernels
// are compiled: those of one do not carry the code of the others.
template <class T, bool kIsInt8>
QUEST_DEVICE void summarise_page(const Summaries& s, const Update& u, int batch_row, int kv_head,
                                 int64_t page, const float* channel_scale, char* row) {
  const int width = lanes_for(s.head_dim / 8);
  PageBounds<T> bounds;
  bounds.read(s, u, batch_row, kv_head, page, width);
  sync_warp();
  if (kIsInt8) {
    write_int8_row(s, bounds, channel_scale, width, row);
  } else {
    write_row(s, bounds, width, row);
  }
  sync_warp();
}

// In pieces that every stored row is aligned to.
template <class T, bool kIsInt8>
QUEST_DEVICE void store_row(const Summaries& s, const char* row, char* stored) {
  if (kIsInt8) {
#pragma unroll 1
    for (int i = lane_index(); i < s.rows.row_bytes; i += 32) stored[i] = row[i];
  } else {
#pragma unroll 1
    for (int i = lane_index(); i < 2 * s.head_dim; i += 32) {
      reinterpret_cast<T*>(stored)[i] = reinterpret_cast<const T*>(row)[i];
    }
  }
}

// Whether a stored row has other bits, for a whole warp.
template <class T, bool kIsInt8>
QUEST_DEVICE bool row_differs(const Summaries& s, const char* row, const char* stored) {
  bool differs = false;
  if (kIsInt8) {
#pragma unroll 1
    for (int i = lane_index(); i < s.rows.row_bytes; i += 32) {
      differs = differs || row[i] != stored[i];
    }
  } else {
#pragma unroll 1
    for (int i = lane_index(); i < 2 * s.head_dim; i += 32) {
      const uint32_t stored_bits = bits_of(reinterpret_cast<const T*>(stored)[i]);
      differs = differs || bits_of(reinterpret_cast<const T*>(row)[i]) != stored_bits;
    }
  }
  return ballot(differs) != 0;
}

// channel_scale [head_dim], in shared memory, from up to kScalePages pages, by the whole CTA: about
// the largest key of each channel. Scales stay far from the ends of float32, and no channel gets
// less than 1/1024 of the largest.
template <class T>
QUEST_DEVICE void scale_channels(const Summaries& s, const Update& u, int batch_row, int kv_head,
                                 int64_t num_pages, float* channel_scale, WarpValues& shared) {
  for (int d = thread_index(); d < s.head_dim; d += kThreads) channel_scale[d] = 0;
  sync_cta();
  const int width = lanes_for(s.head_dim / 8), channel = lane_index() % width * 8;
  for (int64_t i = warp_index(); i < kScalePages; i += kWarps) {
    const int64_t page = i * num_pages / kScalePages;
    if (i > 0 && page == (i - 1) * num_pages / kScalePages) continue;
    PageBounds<T> bounds;
    bounds.read(s, u, batch_row, kv_head, page, width);
    if (lane_index() >= width || channel >= s.head_dim) continue;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      // NaN and infinity say nothing about the others. Bits of floats above 0 are in their order.
      const float size = bounds.size(j);
      if (size < kInfinity) {
        atomic_max(reinterpret_cast<int32_t*>(channel_scale) + channel + j,
                   static_cast<int32_t>(as_bits(size)));
      }
    }
  }
  sync_cta();
  uint32_t bits = 0;
  for (int d = thread_index(); d < s.head_dim; d += kThreads) bits = as_bits(channel_scale[d]);
  const float smallest = fmaxf(multiply(as_float(largest(bits, shared)), 0x1p-10f), 1e-20f);
  for (int d = thread_index(); d < s.head_dim; d += kThreads) {
    channel_scale[d] = fminf(fmaxf(channel_scale[d], smallest), 1e20f);
  }
  sync_cta();
}

}  // namespace cuda
}  // namespace quest
