// Rows that a warp rotates (quest_compile/ops/summaries/sketch.py): vectors of 128 channels, of
// which each lane has 4 side by side. A row is one vector or, beyond 128 channels, two.
#pragma once

#include "cuda/cta.h"

namespace quest {
namespace cuda {

constexpr int kVectors = 4;  // at a time
constexpr int kVectorChannels = 128;
using Vectors = float[kVectors][4];

QUEST_BOTH int vectors_per_row(int head_dim) { return head_dim > kVectorChannels ? 2 : 1; }

class Rotation {
 public:
  QUEST_DEVICE explicit Rotation(int head_dim)
      : head_dim_(head_dim), is_wide_(head_dim > kVectorChannels) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      signs_[i] = rotation_sign(i / 4 * kVectorChannels + 4 * lane_index() + i % 4);
    }
  }

  QUEST_DEVICE int rows_at_a_time() const { return is_wide_ ? kVectors / 2 : kVectors; }
  QUEST_DEVICE bool is_wide() const { return is_wide_; }
  // Of vector v: its row, which of the row's vectors it is, and this lane's first channel.
  QUEST_DEVICE int row(int v) const { return is_wide_ ? v / 2 : v; }
  QUEST_DEVICE int part(int v) const { return is_wide_ ? v % 2 : 0; }
  QUEST_DEVICE int channel(int v) const { return part(v) * kVectorChannels + 4 * lane_index(); }
  QUEST_DEVICE bool has_channel(int v) const { return channel(v) < head_dim_; }

  // This lane's channels of vector v from a row; zeros beyond its end.
  template <class T>
  QUEST_DEVICE void load(const T* row, int v, bool is_aligned, float (&x)[4]) const {
    struct alignas(4 * sizeof(T)) Four {
      T values[4];
    } four = {};
    const T* p = row + channel(v);
    if (has_channel(v)) {
      if (is_aligned) {
        four = *reinterpret_cast<const Four*>(p);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) four.values[i] = p[i];
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = to_float(four.values[i]);
  }

  QUEST_DEVICE void rotate(Vectors& x) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t sign = is_wide_ && v % 2 ? signs_[4 + i] : signs_[i];
        x[v][i] = as_float(as_bits(x[v][i]) ^ sign);
      }
      add_and_subtract(x[v][0], x[v][1]);
      add_and_subtract(x[v][2], x[v][3]);
      add_and_subtract(x[v][0], x[v][2]);
      add_and_subtract(x[v][1], x[v][3]);
    }
    const int size = rotation_size(head_dim_);
#pragma unroll 1
    for (int lanes = 1; lanes < minimum(size, kVectorChannels) / 4; lanes *= 2) {
      const float sign = lane_index() & lanes ? -1.0f : 1.0f;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          x[v][i] = multiply_add(x[v][i], sign, shuffle_xor(x[v][i], lanes));  // rounded once
        }
      }
    }
    if (size <= kVectorChannels) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      add_and_subtract(x[0][i], x[1][i]);
      add_and_subtract(x[2][i], x[3][i]);
    }
  }

  // Over the vectors and lanes of each row; every vector has the result of its row.
  template <class X, class Reduce>
  QUEST_DEVICE void reduce(X (&x)[kVectors], const Reduce& of) const {
    if (is_wide_) {
      x[0] = x[1] = of(x[0], x[1]);
      x[2] = x[3] = of(x[2], x[3]);
    }
#pragma unroll 1
    for (int lanes = 16; lanes > 0; lanes /= 2) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) x[v] = of(x[v], shuffle_xor(x[v], lanes));
    }
  }

 private:
  QUEST_DEVICE static void add_and_subtract(float& low, float& high) {
    const float sum = low + high;
    high = low - high;
    low = sum;
  }

  int head_dim_;
  bool is_wide_;
  uint32_t signs_[8];
};

}  // namespace cuda
}  // namespace quest
