// The number formats of keys, values and summaries.
#pragma once

#include "cuda/device.h"
#ifndef QUEST_EMULATED
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace quest {
namespace cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

constexpr float kInfinity = __builtin_huge_valf();

QUEST_DEVICE float to_float(float x) { return x; }
QUEST_DEVICE float to_float(BFloat16 x) { return as_float(static_cast<uint32_t>(x.bits) << 16); }
#ifdef QUEST_EMULATED
QUEST_DEVICE float to_float(Float16 x) { return half_to_float(x.bits); }
QUEST_DEVICE void from_float(float x, Float16& y) { y.bits = float_to_half(x); }
QUEST_DEVICE void from_float(float x, BFloat16& y) { y.bits = float_to_bfloat(x); }
#else
QUEST_DEVICE float to_float(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }
QUEST_DEVICE void from_float(float x, Float16& y) { y.bits = __half_as_ushort(__float2half_rn(x)); }
QUEST_DEVICE void from_float(float x, BFloat16& y) {
  y.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
}
#endif
QUEST_DEVICE void from_float(float x, float& y) { y = x; }

QUEST_DEVICE uint32_t bits_of(float x) { return as_bits(x); }
QUEST_DEVICE uint32_t bits_of(BFloat16 x) { return x.bits; }
QUEST_DEVICE uint32_t bits_of(Float16 x) { return x.bits; }

template <class T>
QUEST_DEVICE uint32_t pack(float low, float high) {
  T a, b;
  from_float(low, a);
  from_float(high, b);
  return a.bits | static_cast<uint32_t>(b.bits) << 16;
}

struct alignas(16) Vector {
  uint32_t words[4];
};
struct alignas(8) HalfVector {
  uint32_t words[2];
};

// 16 bytes of T, element by element where the address allows no more.
template <class T>
QUEST_DEVICE Vector load_vector(const T* p, bool is_aligned) {
  if (is_aligned) return *reinterpret_cast<const Vector*>(p);
  Vector x;
  T* elements = reinterpret_cast<T*>(x.words);
#pragma unroll
  for (int i = 0; i < static_cast<int>(16 / sizeof(T)); ++i) elements[i] = p[i];
  return x;
}

// 8 values of a row as they lie in memory.
template <class T>
struct Eight {
  Vector data[sizeof(T) / 2];

  QUEST_DEVICE void load(const T* p, bool is_aligned) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(T) / 2); ++i) {
      data[i] = load_vector(p + i * (16 / sizeof(T)), is_aligned);
    }
  }
  QUEST_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(T) / 2); ++i) data[i] = {{0, 0, 0, 0}};
  }
  // Bit pattern of element i, sign extended.
  QUEST_DEVICE int32_t bits(int i) const {
    if (sizeof(T) == 4) return static_cast<int32_t>(data[i / 4].words[i % 4]);
    return static_cast<int32_t>(data[0].words[i / 2] << (i % 2 ? 0 : 16)) >> 16;
  }
  QUEST_DEVICE float operator[](int i) const;
};

template <>
QUEST_DEVICE float Eight<float>::operator[](int i) const {
  return as_float(static_cast<uint32_t>(bits(i)));
}
template <>
QUEST_DEVICE float Eight<BFloat16>::operator[](int i) const {
  const uint32_t word = data[0].words[i / 2];
  return as_float(i % 2 ? word & 0xffff0000u : word << 16);
}
template <>
QUEST_DEVICE float Eight<Float16>::operator[](int i) const {
  return to_float(Float16{static_cast<uint16_t>(bits(i))});
}

// Integers in the order of the floats with these bits; its own inverse.
template <class T>
QUEST_DEVICE int32_t flip_negative(int32_t bits) {
  constexpr int32_t kMagnitude = sizeof(T) == 4 ? 0x7fffffff : 0x7fff;
  return bits ^ ((bits >> 31) & kMagnitude);
}

QUEST_DEVICE float sum_of_warp(float x, int width) {
  for (int lanes = width / 2; lanes > 0; lanes /= 2) x += shuffle_xor(x, lanes);
  return x;
}

template <class T>
QUEST_DEVICE T minimum(T a, T b) {
  return a < b ? a : b;
}
template <class T>
QUEST_DEVICE T maximum(T a, T b) {
  return a > b ? a : b;
}

}  // namespace cuda
}  // namespace quest
