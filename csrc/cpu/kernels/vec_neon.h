// 4 floats: AArch64 Advanced SIMD.
#pragma once

#include <arm_neon.h>

namespace quest {
namespace QUEST_ISA {

constexpr int kWidth = 4;
// Accumulators of a dot-product tile (dot.h).
constexpr int kTileSize = 16;
// Column pairs that H heads accumulate at a time (value.h).
constexpr int kValuePairs(int num_heads) { return num_heads == 4 ? 2 : 4; }
constexpr float kExp2Floor = -127.0f;

struct V {
  float32x4_t v;
};
struct Pair {
  V lo, hi;
};

QUEST_INLINE V zero() { return {vdupq_n_f32(0)}; }
QUEST_INLINE V set1(float x) { return {vdupq_n_f32(x)}; }
QUEST_INLINE V load(const float* p) { return {vld1q_f32(p)}; }
QUEST_INLINE void store(float* p, V x) { vst1q_f32(p, x.v); }
QUEST_INLINE V operator+(V a, V b) { return {vaddq_f32(a.v, b.v)}; }
QUEST_INLINE V operator-(V a, V b) { return {vsubq_f32(a.v, b.v)}; }
QUEST_INLINE V operator*(V a, V b) { return {vmulq_f32(a.v, b.v)}; }
QUEST_INLINE V fma(V a, V b, V c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
// b where one of them is NaN.
QUEST_INLINE V max(V a, V b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }
QUEST_INLINE V round(V x) { return {vrndnq_f32(x.v)}; }
// x * 2^n for n in [-127, 127], 0 for n = -127.
QUEST_INLINE V ldexp(V x, V n) {
  const int32x4_t exponent = vaddq_s32(vcvtq_s32_f32(n.v), vdupq_n_s32(127));
  return {vmulq_f32(x.v, vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23)))};
}

QUEST_INLINE uint16x8_t load_8(const void* p) { return vld1q_u16(static_cast<const uint16_t*>(p)); }

QUEST_INLINE Pair load_pair(const float* p) { return {load(p), load(p + 4)}; }
QUEST_INLINE Pair load_pair(const BFloat16* p) {
  const uint32x4_t x = vreinterpretq_u32_u16(load_8(p));
  return {{vreinterpretq_f32_u32(vshlq_n_u32(x, 16))},
          {vreinterpretq_f32_u32(vandq_u32(x, vdupq_n_u32(0xffff0000)))}};
}
QUEST_INLINE Pair load_pair(const Float16* p) {
  const float16x8_t x = vreinterpretq_f16_u16(load_8(p));
  return {{vcvt_f32_f16(vget_low_f16(x))}, {vcvt_high_f32_f16(x)}};
}
// A pair is 8 elements wide and rows are multiples of 8: there is never a rest.
template <class T>
QUEST_INLINE Pair load_pair(const T* p, int) {
  return load_pair(p);
}

QUEST_INLINE void store_as(float* p, V x) { store(p, x); }
QUEST_INLINE void store_as(BFloat16* p, V x) {
  const uint32x4_t bits = vreinterpretq_u32_f32(x.v);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  rounded = vbslq_u32(vceqq_f32(x.v, x.v), rounded, vdupq_n_u32(0x7fc00000));
  vst1_u16(&p->bits, vshrn_n_u32(rounded, 16));
}
QUEST_INLINE void store_as(Float16* p, V x) {
  vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32(x.v)));
}

// Lane i of the result joins the lanes of rows[i].
template <class Join>
QUEST_INLINE V join_rows(const V* rows, const Join& join) {
  V pairs[2];
  QUEST_UNROLL
  for (int i = 0; i < 2; ++i) {
    const float32x4_t x = rows[2 * i].v, y = rows[2 * i + 1].v;
    pairs[i] = join(V{vuzp1q_f32(x, y)}, V{vuzp2q_f32(x, y)});
  }
  return join(V{vuzp1q_f32(pairs[0].v, pairs[1].v)}, V{vuzp2q_f32(pairs[0].v, pairs[1].v)});
}

// Bit i: keys[i] > threshold, for kWidth keys.
QUEST_INLINE uint32_t mask_greater(const int32_t* keys, int32_t threshold) {
  static const uint32_t bits[4] = {1, 2, 4, 8};
  const uint32x4_t greater = vcgtq_s32(vld1q_s32(keys), vdupq_n_s32(threshold));
  return vaddvq_u32(vandq_u32(greater, vld1q_u32(bits)));
}

}  // namespace QUEST_ISA
}  // namespace quest
