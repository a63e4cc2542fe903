// Sums of weights over the set bits of 16 tokens: a byte holds the bits of 8 channels of a token,
// and half a byte picks one of the 16 sums of its 4 channels from a table.
//
// Sums are 12-bit integers, kept as two times 6 bits: so four of them add up within a byte.
#pragma once

#include "cpu/kernels/vec.h"
#include "params.h"

namespace quest {
namespace QUEST_ISA {

// Every level has
// sum_signs<kBytes>: sums over a tile of tokens of each page, bits [num_bytes][width], width 16 or
//   8; those behind width are anything. kBytes: num_bytes where it is known, and then a multiple of
//   8; otherwise 0.
// dot_codes: products of int8 codes [size] with 16-bit weights, zero up to a multiple of 32; to be
//   summed over the lanes.
// load_codes: 16 codes as floats.
// largest_of_rows: lane i is the largest lane of rows[i].
constexpr int kMaxSignBytes = kMaxHeadDim / 8;
constexpr int kMaxEntry = 4095;      // of a table
constexpr int kMaxTableSum = 65535;  // of the largest entries of all tables

typedef V Sixteen[16 / kWidth];

#if QUEST_LEVEL == 0
// Every machine: 256 sums a byte.
struct SignTables {
  uint16_t sums[kMaxSignBytes][256];

  // Of half byte j. The even ones come first.
  void set(int j, const int32_t* entries) {
    for (int x = 0; x < 256; ++x) {
      sums[j / 2][x] =
          static_cast<uint16_t>(j % 2 ? sums[j / 2][x] + entries[x >> 4] : entries[x & 15]);
    }
  }
  void complete(int) {}
};

template <int kBytes>
QUEST_INLINE void sum_page_signs(const SignTables& tables, const uint8_t* bits, int num_bytes,
                                 int width, Sixteen& out) {
  uint32_t totals[16] = {};
  for (int j = 0; j < num_bytes; ++j) {
    for (int t = 0; t < width; ++t) totals[t] += tables.sums[j][bits[j * width + t]];
  }
  for (int i = 0; i < 16; ++i) out[i / kWidth].v[i % kWidth] = static_cast<float>(totals[i]);
}
#else
struct SignTables {
  // [low or high 6 bits of the sum][low or high half of the byte][byte][half byte]
  alignas(64) uint8_t parts[2][2][kMaxSignBytes][16];

  // Of half byte j.
  void set(int j, const int32_t* entries) {
    for (int x = 0; x < 16; ++x) {
      parts[0][j % 2][j / 2][x] = static_cast<uint8_t>(entries[x] & 63);
      parts[1][j % 2][j / 2][x] = static_cast<uint8_t>(entries[x] >> 6);
    }
  }
  // Whole vectors of tables are read.
  void complete(int num_halves) {
    for (int j = num_halves / 2; j < (num_halves / 2 + 7) / 8 * 8; ++j) {
      for (int i = 0; i < 4; ++i) memset(parts[i / 2][i % 2][j], 0, 16);
    }
  }
};
#endif

}  // namespace QUEST_ISA
}  // namespace quest

#if QUEST_LEVEL >= 1 && QUEST_LEVEL <= 3
#include "cpu/kernels/lookup_x86.h"
#endif

namespace quest {
namespace QUEST_ISA {

#if QUEST_LEVEL == 4
template <int kBytes>
QUEST_INLINE void sum_page_signs(const SignTables& tables, const uint8_t* bits, int num_bytes,
                                 int width, Sixteen& out) {
  const uint8x16_t half = vdupq_n_u8(15);
  uint16x8_t low[2], high[2];
  for (int part = 0; part < 2; ++part) low[part] = high[part] = vdupq_n_u16(0);
  for (int j = 0; j < num_bytes; j += 2) {
    uint8x16_t sums[2] = {vdupq_n_u8(0), vdupq_n_u8(0)};
    for (int i = j; i < j + 2 && i < num_bytes; ++i) {
      const uint8x16_t x =
          width == 16 ? vld1q_u8(bits + 16 * i) : vcombine_u8(vld1_u8(bits + 8 * i), vdup_n_u8(0));
      for (int part = 0; part < 2; ++part) {
        const uint8x16_t a = vqtbl1q_u8(vld1q_u8(tables.parts[part][0][i]), vandq_u8(x, half));
        const uint8x16_t b = vqtbl1q_u8(vld1q_u8(tables.parts[part][1][i]), vshrq_n_u8(x, 4));
        sums[part] = vaddq_u8(sums[part], vaddq_u8(a, b));
      }
    }
    for (int part = 0; part < 2; ++part) {
      low[part] = vaddw_u8(low[part], vget_low_u8(sums[part]));
      high[part] = vaddw_high_u8(high[part], sums[part]);
    }
  }
  const uint16x8_t totals[2] = {vaddq_u16(low[0], vshlq_n_u16(low[1], 6)),
                                vaddq_u16(high[0], vshlq_n_u16(high[1], 6))};
  for (int i = 0; i < 2; ++i) {
    out[2 * i].v = vcvtq_f32_u32(vmovl_u16(vget_low_u16(totals[i])));
    out[2 * i + 1].v = vcvtq_f32_u32(vmovl_high_u16(totals[i]));
  }
}

QUEST_INLINE V dot_codes(const int8_t* codes, const int16_t* weights, int size) {
  int32x4_t sum = vdupq_n_s32(0);
  for (int i = 0; i < size; i += 8) {
    const int16x8_t x = vmovl_s8(vld1_s8(codes + i)), w = vld1q_s16(weights + i);
    sum = vmlal_s16(sum, vget_low_s16(x), vget_low_s16(w));
    sum = vmlal_high_s16(sum, x, w);
  }
  return {vcvtq_f32_s32(sum)};
}

QUEST_INLINE void load_codes(const uint8_t* codes, Sixteen& out) {
  const uint8x16_t x = vld1q_u8(codes);
  const uint16x8_t halves[2] = {vmovl_u8(vget_low_u8(x)), vmovl_high_u8(x)};
  for (int i = 0; i < 2; ++i) {
    out[2 * i].v = vcvtq_f32_u32(vmovl_u16(vget_low_u16(halves[i])));
    out[2 * i + 1].v = vcvtq_f32_u32(vmovl_high_u16(halves[i]));
  }
}

QUEST_INLINE V largest_of_rows(const V* rows) {
  return {vpmaxq_f32(vpmaxq_f32(rows[0].v, rows[1].v), vpmaxq_f32(rows[2].v, rows[3].v))};
}

#elif QUEST_LEVEL == 0
QUEST_INLINE V dot_codes(const int8_t* codes, const int16_t* weights, int size) {
  int32_t sums[kWidth] = {};
  for (int i = 0; i < size; ++i) sums[i % kWidth] += codes[i] * weights[i];
  V out;
  for (int i = 0; i < kWidth; ++i) out.v[i] = static_cast<float>(sums[i]);
  return out;
}

QUEST_INLINE void load_codes(const uint8_t* codes, Sixteen& out) {
  for (int i = 0; i < 16; ++i) out[i / kWidth].v[i % kWidth] = codes[i];
}

QUEST_INLINE V largest_of_rows(const V* rows) {
  V out;
  for (int r = 0; r < kWidth; ++r) {
    out.v[r] = rows[r].v[0];
    for (int i = 1; i < kWidth; ++i) out.v[r] = rows[r].v[i] > out.v[r] ? rows[r].v[i] : out.v[r];
  }
  return out;
}
#endif

#if QUEST_LEVEL != 1
template <int kBytes, int kPages>
QUEST_INLINE void sum_signs(const SignTables& tables, const uint8_t* const (&bits)[kPages],
                            int num_bytes, int width, Sixteen (&out)[kPages]) {
  QUEST_UNROLL
  for (int k = 0; k < kPages; ++k) {
    sum_page_signs<kBytes>(tables, bits[k], num_bytes, width, out[k]);
  }
}
#endif

}  // namespace QUEST_ISA
}  // namespace quest
