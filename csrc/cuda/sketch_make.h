// Page sketches (csrc/sketch_row.h), made by a warp each. The bits are those of the reference: sums
// have its order, and products are rounded before they are added.
#pragma once

#include "cuda/sketch_rotation.h"
#include "cuda/summary_rows.h"

namespace quest {
namespace cuda {

// Squares in shared memory, of each warp: rows of them are 8 banks apart.
constexpr int kSketchScratch = kVectors * (kVectorChannels + 8);

template <class T>
class SketchMaker {
 public:
  QUEST_DEVICE SketchMaker(const Summaries& s, const Update& u, float* scratch)
      : s_(s), u_(u), rotation_(s.head_dim), squares_(scratch) {}

  // keys: the first of the page; the row to `row`, in shared memory.
  QUEST_DEVICE void make(const T* keys, char* row) {
    const SketchRow layout = sketch_row(s_.head_dim, s_.rows.format);
    sync_warp();
#pragma unroll 1
    for (int i = lane_index() * 16; i < layout.row_bytes; i += 32 * 16) {
      *reinterpret_cast<Vector*>(row + i) = {{0, 0, 0, 0}};
    }
    sync_warp();
    float mean[2][4] = {};  // the sum, then what is stored of the mean
    int num_finite = 0;
    // The mean first, then the tokens.
#pragma unroll 1
    for (int pass = 0; pass < 2; ++pass) {
#pragma unroll 1
      for (int first = 0; first < s_.page_size; first += rotation_.rows_at_a_time()) {
        Vectors x;
        const unsigned finite = load(keys + first * u_.key_cache.token_stride, x);
        rotation_.rotate(x);
        if (pass == 1) {
          write_tokens(first, finite, mean, x, row, layout);
          continue;
        }
        num_finite += count_bits(finite);
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (rotation_.is_wide() && v % 2) {
              mean[1][i] += x[v][i];
            } else {
              mean[0][i] += x[v][i];
            }
          }
        }
      }
      if (pass == 0)
        write_mean(mean, rotation_.is_wide() ? num_finite / 2 : num_finite, row, layout);
    }
    sync_warp();
  }

 private:
  // Of the tokens from `keys` on; tokens that are not finite are zeros. Bit v: that of vector v is.
  QUEST_DEVICE unsigned load(const T* keys, Vectors& x) const {
    unsigned finite = 0;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      rotation_.load(keys + rotation_.row(v) * u_.key_cache.token_stride, v, u_.has_aligned_keys,
                     x[v]);
      bool is_odd = false;
#pragma unroll
      for (int i = 0; i < 4; ++i) is_odd = is_odd || !(fabsf(x[v][i]) < kInfinity);
      finite |= static_cast<unsigned>(ballot(is_odd) == 0) << v;
    }
    if (rotation_.is_wide()) {
      finite &= (finite >> 1 & 5) | (finite << 1 & 10);
    }
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float bounded = fminf(fmaxf(x[v][i], -kSketchMaxKey), kSketchMaxKey);
        x[v][i] = finite >> v & 1 ? bounded : 0;
      }
    }
    return finite;
  }

  QUEST_DEVICE void write_mean(float (&mean)[2][4], int num_finite, char* row,
                               const SketchRow& layout) {
    const float inverse = divide(1.0f, static_cast<float>(maximum(num_finite, 1)));
    float largest = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float& x = mean[i / 4][i % 4];
      x = multiply(x, inverse);
      largest = fmaxf(largest, fabsf(x));
    }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2)
      largest = fmaxf(largest, shuffle_xor(largest, lanes));
    const float scale = fmaxf(divide(largest, 127.0f), kSketchMinScale);
    if (lane_index() == 0) memcpy(row + layout.mean_scale, &scale, sizeof(scale));
#pragma unroll 1
    for (int part = 0; part < vectors_per_row(s_.head_dim); ++part) {
      const int channel = part * kVectorChannels + 4 * lane_index();
      uint32_t word = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int nearest = nearest_int(divide(part ? mean[1][i] : mean[0][i], scale));
        const int code = maximum(-127, minimum(127, nearest));
        word |= static_cast<uint32_t>(code & 255) << 8 * i;
        const float stored = multiply(static_cast<float>(code), scale);
        if (part) {
          mean[1][i] = stored;
        } else {
          mean[0][i] = stored;
        }
      }
      if (channel < s_.head_dim) *reinterpret_cast<uint32_t*>(row + layout.mean + channel) = word;
    }
  }

  // Rotated tokens from `first` on: bits and scales of what the mean leaves.
  QUEST_DEVICE void write_tokens(int first, unsigned finite, const float (&mean)[2][4], Vectors& x,
                                 char* row, const SketchRow& layout) {
    const int stride = vectors_per_row(s_.head_dim) * kVectorChannels + 8;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      float* square = squares_ + rotation_.row(v) * stride + rotation_.channel(v);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[v][i] -= rotation_.is_wide() && v % 2 ? mean[1][i] : mean[0][i];
        square[i] = multiply(x[v][i], x[v][i]);
      }
    }
    write_plane(row, first, finite, [&](int v, int i) { return x[v][i] >= 0; });
    sync_warp();
    const int mine = minimum(lane_index() / 8, rotation_.rows_at_a_time() - 1);
    const float square = sum_of_squares(squares_ + mine * stride);
    const float num_channels = static_cast<float>(s_.head_dim);
    float scale = square_root(divide(square, num_channels));
    if (layout.num_planes == 2) {
      bool is_outer[kVectors][4];
      float level = multiply(num_channels, 0.25f);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const float deviation = shuffle(scale, 8 * rotation_.row(v));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          is_outer[v][i] = rotation_.has_channel(v) && fabsf(x[v][i]) >= deviation;
          const int count = count_bits(ballot(is_outer[v][i]));
          if (rotation_.row(v) == mine) level += static_cast<float>(2 * count);  // exact
        }
      }
      write_plane(row + layout.second_plane, first, finite,
                  [&](int v, int i) { return is_outer[v][i] == (x[v][i] >= 0); });
      scale = square_root(divide(square, level));
    }
    if (lane_index() % 8 != 0 || lane_index() / 8 != mine) return;
    BFloat16 stored = {kSketchNotFinite};
    if (finite >> (rotation_.is_wide() ? 2 * mine : mine) & 1) from_float(scale, stored);
    reinterpret_cast<BFloat16*>(row + layout.token_scales)[first + mine] = stored;
  }

  // ((0+4)+(2+6)) + ((1+5)+(3+7)) of 8 sums side by side, one of each lane of 8.
  QUEST_DEVICE float sum_of_squares(const float* squares) const {
    float sum = 0;
#pragma unroll 8
    for (int d = lane_index() % 8; d < s_.head_dim; d += 8) sum += squares[d];
    sum += shuffle_xor(sum, 4);
    sum += shuffle_xor(sum, 2);
    return sum + shuffle_xor(sum, 1);
  }

  // bit(v, i): of this lane's channel i of vector v.
  template <class Bit>
  QUEST_DEVICE void write_plane(char* plane, int first, unsigned finite, const Bit& bit) const {
    // Lane 4 * v + c has block c of vector v.
    uint32_t lanes[4] = {};
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t bits = ballot(rotation_.has_channel(v) && bit(v, i));
        if (lane_index() / 4 == v) lanes[i] = bits;
      }
    }
    const int v = lane_index() / 4, num_blocks = (s_.head_dim + kSketchBlock - 1) / kSketchBlock;
    const int block = rotation_.part(v) * (kVectorChannels / kSketchBlock) + lane_index() % 4;
    if (v >= kVectors || block >= num_blocks || !(finite >> v & 1)) return;
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) word |= (lanes[i] >> 8 * (lane_index() % 4) & 255) << 8 * i;
    const int token = first + rotation_.row(v);
    const int place =
        (token / kSketchTile * num_blocks + block) * kSketchTile + token % kSketchTile;
    reinterpret_cast<uint32_t*>(plane)[place] = word;
  }

  const Summaries& s_;
  const Update& u_;
  Rotation rotation_;
  float* squares_;  // [rows at a time, channels of their vectors + 8]
};

}  // namespace cuda
}  // namespace quest
