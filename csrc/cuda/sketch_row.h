// Page sketches (quest_compile/ops/reference_sketch.py), made by a warp each: the bits are those of
// the reference, so sums have its order and products are rounded before they are added. Layout of a
// row: params.h, kSketch.
#pragma once

#include "cuda/cta.h"

namespace quest {
namespace cuda {

// Bytes from the start of a row.
struct SketchLayout {
  int num_bytes;  // of the bits of a token in a plane
  int plane;      // size of a plane
  int mean;
  int codes;
  int scales;
};

QUEST_BOTH SketchLayout sketch_layout(const Summaries& s) {
  const int num_bytes = s.head_dim / 8, plane = s.page_size * num_bytes;
  const int mean = static_cast<int>(s.rows.format.sketch_bits) * plane;
  const int codes = mean + s.head_dim;
  return {num_bytes, plane, mean, codes, codes + s.page_size};
}

// What the channels of a KV head are measured with, shared by the CTA: the rows of channel_scale
// [3, head_dim], the inverse of the last one, and its sum.
struct SketchChannels {
  float* centre;
  float* mean_scale;
  float* scale;
  float* inverse;
  float* sum;

  QUEST_DEVICE SketchChannels(float* memory, int head_dim)
      : centre(memory),
        mean_scale(memory + head_dim),
        scale(memory + 2 * head_dim),
        inverse(memory + 3 * head_dim),
        sum(memory + 4 * head_dim) {}
};
QUEST_BOTH int sketch_channel_floats(int head_dim) { return 4 * head_dim + 4; }

// In shared memory, one of each warp.
QUEST_BOTH int sketch_scratch_floats(const Summaries& s) {
  return 2 * s.head_dim + s.page_size + kMaxPageSize / 32;
}

// ((0+4)+(2+6)) + ((1+5)+(3+7)) of the values of 8 lanes side by side.
QUEST_DEVICE float sum_of_eight(float x) {
  x += shuffle_xor(x, 4);
  x += shuffle_xor(x, 2);
  return x + shuffle_xor(x, 1);
}

constexpr float kMaxSketchKey = 1e11f;

// A page of keys, for a whole warp. Which tokens are finite, the mean of those and what is derived
// from it are in shared memory.
template <class T>
class SketchPage {
 public:
  QUEST_DEVICE SketchPage(const Summaries& s, const Update& u, int batch_row, int kv_head,
                          int64_t page, float* scratch)
      : s_(s), stride_(u.key_cache.token_stride), is_aligned_(u.has_aligned_keys) {
    keys_ = cache_of<T>(u.key_cache, batch_row, kv_head) + page * s.page_size * stride_;
    mean_ = scratch;
    values_ = mean_ + s.head_dim;
    token_scales_ = values_ + s.head_dim;
    finite_ = reinterpret_cast<uint32_t*>(token_scales_ + s.page_size);
  }

  QUEST_DEVICE void read_mean() {
    sync_warp();
    num_finite_ = s_.page_size;
    inverse_ = divide(1.0f, static_cast<float>(num_finite_));
    if (lane_index() < kMaxPageSize / 32) finite_[lane_index()] = 0xffffffffu;
    sync_warp();
    // As if all were finite; if that is so, it is the mean.
    if (!sum_tokens()) return;
    num_finite_ = 0;
    for (int t = 0; t < s_.page_size; ++t) {
      bool is_odd = false;
      for (int c = lane_index() * 4; c < s_.head_dim; c += 128) {
        float x[4];
        load(t, c, x);
        is_odd = is_odd || !are_finite(x);
      }
      const bool is_finite = ballot(is_odd) == 0;
      num_finite_ += is_finite;
      if (!is_finite && lane_index() == 0) finite_[t / 32] &= ~(1u << t % 32);
    }
    sync_warp();
    inverse_ = divide(1.0f, static_cast<float>(maximum(num_finite_, 1)));
    sum_tokens();
  }

  // Behind read_mean: the mean size of what is left of each channel, to values().
  QUEST_DEVICE void read_deviation() {
    for (int c = lane_index() * 4; c < s_.head_dim; c += 128) {
      float sum[4] = {0, 0, 0, 0};
#pragma unroll 4
      for (int t = 0; t < s_.page_size; ++t) {
        float x[4];
        load_residual(t, c, x);
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[i] += multiply(fabsf(x[i]), inverse_);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) values_[c + i] = sum[i];
    }
    sync_warp();
  }

  // Behind read_mean: the sketch to `row`, in shared memory.
  QUEST_DEVICE void write(const SketchChannels& channels, char* row) {
    const SketchLayout layout = sketch_layout(s_);
    write_mean(channels, row, layout);
    float largest = 0;
    for (int first = 0; first < s_.page_size; first += kSketchTile) {
      largest = fmaxf(largest, write_tile(channels, first, row, layout));
    }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2)
      largest = fmaxf(largest, shuffle_xor(largest, lanes));
    sync_warp();
    const float unit = fmaxf(divide(largest, 254.0f), 1e-30f);
    for (int t = lane_index(); t < s_.page_size; t += 32) {
      const int code = nearest_int(divide(token_scales_[t], unit));
      row[layout.codes + t] =
          static_cast<char>(static_cast<uint8_t>(is_finite(t) ? code : kSketchNotFinite));
    }
    if (lane_index() == 0) memcpy(row + layout.scales + 4, &unit, sizeof(unit));
    sync_warp();
  }

  QUEST_DEVICE bool has_finite() const { return num_finite_ > 0; }
  QUEST_DEVICE float* mean() const { return mean_; }
  QUEST_DEVICE float* values() const { return values_; }

 private:
  QUEST_DEVICE bool is_finite(int t) const { return finite_[t / 32] >> t % 32 & 1; }
  QUEST_DEVICE static bool are_finite(const float (&x)[4]) {
    bool found = true;
#pragma unroll
    for (int i = 0; i < 4; ++i) found = found && fabsf(x[i]) < kInfinity;
    return found;
  }
  QUEST_DEVICE static float bounded(float x) {
    return fminf(fmaxf(x, -kMaxSketchKey), kMaxSketchKey);
  }

  // Channels [c, c + 4) of a token.
  QUEST_DEVICE void load(int t, int c, float (&x)[4]) const {
    const T* p = keys_ + t * stride_ + c;
    struct alignas(4 * sizeof(T)) Four {
      T values[4];
    } four;
    if (is_aligned_) {
      four = *reinterpret_cast<const Four*>(p);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) four.values[i] = p[i];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = to_float(four.values[i]);
  }
  QUEST_DEVICE void load_residual(int t, int c, float (&x)[4]) const {
    load(t, c, x);
    const bool counts = is_finite(t);
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = counts ? bounded(x[i]) - mean_[c + i] : 0;
  }

  // The mean of the tokens that finite_ marks; whether one of them is not.
  QUEST_DEVICE bool sum_tokens() {
    bool is_odd = false;
    for (int c = lane_index() * 4; c < s_.head_dim; c += 128) {
      float sum[4] = {0, 0, 0, 0};
#pragma unroll 4
      for (int t = 0; t < s_.page_size; ++t) {
        float x[4];
        load(t, c, x);
        if (!is_finite(t)) continue;
        is_odd = is_odd || !are_finite(x);
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[i] += multiply(bounded(x[i]), inverse_);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) mean_[c + i] = sum[i];
    }
    sync_warp();
    return ballot(is_odd) != 0;
  }

  QUEST_DEVICE void write_mean(const SketchChannels& channels, char* row,
                               const SketchLayout& layout) {
    float largest = 0;
    for (int d = lane_index(); d < s_.head_dim; d += 32) {
      values_[d] = divide(mean_[d] - channels.centre[d], channels.mean_scale[d]);
      largest = fmaxf(largest, fabsf(values_[d]));
    }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2)
      largest = fmaxf(largest, shuffle_xor(largest, lanes));
    float scale = fmaxf(divide(largest, 127.0f), 1e-15f);
    for (int d = lane_index(); d < s_.head_dim; d += 32) {
      const int code = nearest_int(divide(values_[d], scale));
      row[layout.mean + d] = static_cast<char>(maximum(-127, minimum(127, code)));
    }
    if (num_finite_ < s_.page_size) scale = -scale;
    if (lane_index() == 0) memcpy(row + layout.scales, &scale, sizeof(scale));
  }

  // Bits and scales of up to 16 tokens from `first` on, by two lanes each: one has the first four
  // of every 8 channels. Returns the scale of this lane's token.
  QUEST_DEVICE float write_tile(const SketchChannels& channels, int first, char* row,
                                const SketchLayout& layout) {
    const int width = minimum(kSketchTile, s_.page_size - first);
    const int place = lane_index() % kSketchTile, half = lane_index() / kSketchTile;
    const bool has_token = place < width;
    const int token = first + (has_token ? place : 0);
    char* out = has_token ? row + first * layout.num_bytes + place : nullptr;
    float sum[4] = {0, 0, 0, 0};
#pragma unroll 2
    for (int g = 0; g < layout.num_bytes; ++g) {
      const int c = 8 * g + 4 * half;
      float x[4];
      load_residual(token, c, x);
      int bits = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        bits |= (x[i] >= 0) << i;
        sum[i] += multiply(multiply(x[i], x[i]), channels.inverse[c + i]);
      }
      write_bits(bits, half, out, g * width);
    }
    const float size = sum_of_channels(sum);
    float token_scale = square_root(divide(size, *channels.sum));
    if (s_.rows.format.sketch_bits == 2) {
      out = out ? out + layout.plane : nullptr;
      float levels[4] = {0, 0, 0, 0};
#pragma unroll 2
      for (int g = 0; g < layout.num_bytes; ++g) {
        const int c = 8 * g + 4 * half;
        float x[4];
        load_residual(token, c, x);
        int bits = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float scale = channels.scale[c + i];
          const bool is_outer = fabsf(x[i]) >= multiply(token_scale, scale);
          bits |= (is_outer == (x[i] >= 0)) << i;
          levels[i] += multiply(scale, is_outer ? 2.25f : 0.25f);
        }
        write_bits(bits, half, out, g * width);
      }
      token_scale = square_root(divide(size, sum_of_channels(levels)));
    }
    if (!has_token) return 0;
    if (half == 0) token_scales_[token] = token_scale;
    return token_scale;
  }

  QUEST_DEVICE static void write_bits(int bits, int half, char* out, int place) {
    const int other = shuffle_xor(bits, kSketchTile);
    if (out && half == 0) out[place] = static_cast<char>(bits | other << 4);
  }
  QUEST_DEVICE static float sum_of_channels(float (&x)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] += shuffle_xor(x[i], kSketchTile);
    return (x[0] + x[2]) + (x[1] + x[3]);
  }

  const Summaries& s_;
  const T* keys_;
  int64_t stride_;
  bool is_aligned_;
  int num_finite_;
  float inverse_;        // of the number of finite tokens
  float* mean_;          // [head_dim]
  float* values_;        // [head_dim]
  float* token_scales_;  // [page_size]
  uint32_t* finite_;     // a bit per token
};

}  // namespace cuda
}  // namespace quest
