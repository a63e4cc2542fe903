// Attention of up to 16 query heads over tiles of 16 tokens, by one warp: logits, softmax and the
// sum of values so far. MatrixWarp uses matrix instructions, ScalarWarp serves float32.
#pragma once

#include "cuda/cta.h"

namespace quest {
namespace cuda {

// A row of a tile in shared memory: 16 more bytes make that 8 rows lie in all the banks.
template <class T, int kDim>
constexpr int kTileRowBytes = kDim * static_cast<int>(sizeof(T)) + 16;

// Warps that attend: as many as have their tiles in about 64 KiB.
template <class T, int kDim>
constexpr int kTileWarps = kTileRowBytes<T, kDim> <= 288   ? 8
                           : kTileRowBytes<T, kDim> <= 576 ? 4
                                                           : 2;

// What a warp found in a unit: maxima [heads], sums [heads], values [heads, value_dim].
struct WarpResult {
  float* maxima;
  float* sums;
  float* values;
};

// T: 16 bits. kDim: head_dim and value_dim are at most that.
template <class T, int kDim>
class MatrixWarp {
 public:
  static constexpr int kMaxDim = kDim;
  static constexpr int kHeads = 16;
  static constexpr int kRowBytes = kTileRowBytes<T, kDim>;
  static constexpr int kNumWarps = kTileWarps<T, kDim>;
  static constexpr int kQueryBytes = kHeads * kRowBytes;
  static constexpr int kScratchBytes = 0;

  // query: [16] rows of kRowBytes, zeros behind head_dim and behind the last head.
  QUEST_DEVICE MatrixWarp(const char* query, char*, int head_dim, int value_dim, float scale_log2)
      : query_(query), head_dim_(head_dim), value_dim_(value_dim), scale_log2_(scale_log2) {
    if (kHasQuery) {
#pragma unroll
      for (int d = 0; d < kDim; d += 16)
        load_matrices(query_row() + d * 2, query_pieces_[d / 16 % kPieces]);
    }
    reset();
  }

  QUEST_DEVICE void reset() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      maxima_[i] = -kInfinity;
      sums_[i] = 0;
    }
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) values_[n][i] = 0;
    }
  }

  // keys, values: [16] rows of kRowBytes, zeros behind head_dim; live: bit i says whether token i
  // is attended; values of others are finite.
  QUEST_DEVICE void attend(const char* keys, const char* values, unsigned live, int num_heads) {
    const int lane = lane_index();
    float logits[2][4] = {};
    const char* key_row = keys + (lane / 16 * 8 + lane % 8) * kRowBytes + lane / 8 % 2 * 16;
    // Copies to registers run ahead of the products.
#pragma unroll
    for (int first = 0; first < kDim; first += 64) {
      if (first >= head_dim_) break;
      uint32_t b[4][4];
#pragma unroll
      for (int d = 0; d < 64; d += 16) load_matrices(key_row + (first + d) * 2, b[d / 16]);
#pragma unroll
      for (int d = 0; d < 64; d += 16) {
        if (!kHasQuery) load_matrices(query_row() + (first + d) * 2, query_pieces_[0]);
        const uint32_t (&a)[4] = query_pieces_[kHasQuery ? (first + d) / 16 % kPieces : 0];
        multiply_matrices<T>(logits[0], a, b[d / 16][0], b[d / 16][1]);
        multiply_matrices<T>(logits[1], a, b[d / 16][2], b[d / 16][3]);
      }
    }
    // Of heads lane / 4 and lane / 4 + 8.
    uint32_t weights[4] = {};
    bool shrinks = false;
    float factors[2] = {1, 1};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (8 * i >= num_heads) break;
      float top = maxima_[i];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& x = logits[n][2 * i + j];
          const int token = n * 8 + lane % 4 * 2 + j;
          x = live >> token & 1 ? x * scale_log2_ : -kInfinity;
          top = fmaxf(top, x);
        }
      }
      top = fmaxf(top, shuffle_xor(top, 1));
      top = fmaxf(top, shuffle_xor(top, 2));
      const float shift = top == -kInfinity ? 0 : top;
      factors[i] = power_of_2(maxima_[i] - shift);
      shrinks = shrinks || factors[i] != 1;
      maxima_[i] = top;
      sums_[i] = multiply(sums_[i], factors[i]);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const float a = power_of_2(logits[n][2 * i] - shift);
        const float b = power_of_2(logits[n][2 * i + 1] - shift);
        sums_[i] += a + b;
        weights[n * 2 + i] = pack<T>(a, b);
      }
    }
    if (ballot(shrinks)) {
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
        for (int j = 0; j < 4; ++j) values_[n][j] *= factors[j / 2];
      }
    }
    const char* value_row = values + lane % 16 * kRowBytes + lane / 16 * 16;
#pragma unroll
    for (int first = 0; first < kDim; first += 64) {
      if (first >= value_dim_) break;
      uint32_t b[4][4];
#pragma unroll
      for (int d = 0; d < 64; d += 16) load_transposed(value_row + (first + d) * 2, b[d / 16]);
#pragma unroll
      for (int d = 0; d < 64; d += 16) {
        multiply_matrices<T>(values_[(first + d) / 8], weights, b[d / 16][0], b[d / 16][1]);
        multiply_matrices<T>(values_[(first + d) / 8 + 1], weights, b[d / 16][2], b[d / 16][3]);
      }
    }
  }

  QUEST_DEVICE void write(const WarpResult& out, int num_heads) {
    const int lane = lane_index();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float sum = sums_[i];
      sum += shuffle_xor(sum, 1);
      sum += shuffle_xor(sum, 2);
      const int head = lane / 4 + 8 * i;
      if (head >= num_heads) continue;
      if (lane % 4 == 0) {
        out.maxima[head] = maxima_[i];
        out.sums[head] = sum;
      }
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        if (n * 8 >= value_dim_) break;
        float* values = out.values + head * value_dim_ + n * 8 + lane % 4 * 2;
        values[0] = values_[n][2 * i];
        values[1] = values_[n][2 * i + 1];
      }
    }
  }

 private:
  // Registers for all of the query.
  static constexpr bool kHasQuery = kDim <= 128;
  static constexpr int kPieces = kHasQuery ? kDim / 16 : 1;
  QUEST_DEVICE const char* query_row() const {
    return query_ + lane_index() % 16 * kRowBytes + lane_index() / 16 * 16;
  }

  const char* query_;
  int head_dim_;
  int value_dim_;
  float scale_log2_;
  uint32_t query_pieces_[kPieces][4];
  float maxima_[2];
  float sums_[2];  // of this lane's tokens
  float values_[kDim / 8][4];
};

template <int kDim>
class ScalarWarp {
 public:
  static constexpr int kMaxDim = kDim;
  static constexpr int kHeads = 8;
  static constexpr int kRowBytes = kTileRowBytes<float, kDim>;
  static constexpr int kNumWarps = kTileWarps<float, kDim>;
  static constexpr int kQueryBytes = kHeads * kRowBytes;
  // Weights of the tile [16, kHeads].
  static constexpr int kScratchBytes = kTileTokens * kHeads * 4;

  QUEST_DEVICE ScalarWarp(const char* query, char* scratch, int head_dim, int value_dim,
                          float scale_log2)
      : query_(query),
        weights_(reinterpret_cast<float*>(scratch)),
        head_dim_(head_dim),
        value_dim_(value_dim),
        scale_log2_(scale_log2) {
    reset();
  }

  QUEST_DEVICE void reset() {
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      maxima_[h] = -kInfinity;
      sums_[h] = 0;
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) values_[h][i][j] = 0;
      }
    }
  }

  QUEST_DEVICE void attend(const char* keys, const char* values, unsigned live, int num_heads) {
    // Lane i: token i % 16, every other piece of 4 channels.
    const int lane = lane_index(), token = lane % 16;
    float logits[kHeads] = {};
    for (int d = lane / 16 * 4; d < head_dim_; d += 8) {
      const float* key = reinterpret_cast<const float*>(keys + token * kRowBytes) + d;
      const float x[4] = {key[0], key[1], key[2], key[3]};
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        if (h >= num_heads) break;
        const float* q = reinterpret_cast<const float*>(query_ + h * kRowBytes) + d;
#pragma unroll
        for (int j = 0; j < 4; ++j) logits[h] = multiply_add(q[j], x[j], logits[h]);
      }
    }
    sync_warp();
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      if (h >= num_heads) break;
      float x = logits[h] + shuffle_xor(logits[h], 16);
      x = live >> token & 1 ? x * scale_log2_ : -kInfinity;
      float top = fmaxf(maxima_[h], x);
#pragma unroll
      for (int lanes = 8; lanes > 0; lanes /= 2) top = fmaxf(top, shuffle_xor(top, lanes));
      const float shift = top == -kInfinity ? 0 : top;
      const float factor = power_of_2(maxima_[h] - shift);
      const float weight = power_of_2(x - shift);
      maxima_[h] = top;
      // Of this lane's tokens; lanes 16 to 31 repeat the others.
      sums_[h] = multiply_add(sums_[h], factor, weight);
      if (lane < 16) weights_[token * kHeads + h] = weight;
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) values_[h][i][j] *= factor;
      }
    }
    sync_warp();
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int channel = (lane + 32 * i) * 4;
      if (channel >= value_dim_) break;
      for (int t = 0; t < kTileTokens; ++t) {
        const float* value = reinterpret_cast<const float*>(values + t * kRowBytes) + channel;
        const float x[4] = {value[0], value[1], value[2], value[3]};
#pragma unroll
        for (int h = 0; h < kHeads; ++h) {
          if (h >= num_heads) break;
          const float weight = weights_[t * kHeads + h];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            values_[h][i][j] = multiply_add(weight, x[j], values_[h][i][j]);
          }
        }
      }
    }
  }

  QUEST_DEVICE void write(const WarpResult& out, int num_heads) {
    const int lane = lane_index();
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      if (h >= num_heads) break;
      const float sum = sum_of_warp(sums_[h], 16);
      if (lane == 0) {
        out.maxima[h] = maxima_[h];
        out.sums[h] = sum;
      }
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        const int channel = (lane + 32 * i) * 4;
        if (channel >= value_dim_) break;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          out.values[h * value_dim_ + channel + j] = values_[h][i][j];
        }
      }
    }
  }

 private:
  static constexpr int kPieces = (kDim + 127) / 128;
  const char* query_;
  float* weights_;
  int head_dim_;
  int value_dim_;
  float scale_log2_;
  float maxima_[kHeads];
  float sums_[kHeads];
  float values_[kHeads][kPieces][4];
};

}  // namespace cuda
}  // namespace quest
