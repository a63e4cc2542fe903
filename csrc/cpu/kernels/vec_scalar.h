// 4 floats in compiler vector types: every machine.
#pragma once

namespace quest {
namespace QUEST_ISA {

constexpr int kWidth = 4;
// Accumulators of a dot-product tile (dot.h).
constexpr int kTileSize = 8;
// Column pairs that H heads accumulate at a time (value.h).
constexpr int kValuePairs(int num_heads) { return num_heads == 4 ? 1 : num_heads == 2 ? 2 : 4; }
constexpr float kExp2Floor = -127.0f;

typedef float Float4 __attribute__((vector_size(16)));
typedef uint32_t UInt4 __attribute__((vector_size(16)));

struct V {
  Float4 v;
};
struct Pair {
  V lo, hi;
};

QUEST_INLINE V set1(float x) { return {Float4{x, x, x, x}}; }
QUEST_INLINE V zero() { return set1(0); }
QUEST_INLINE V load(const float* p) {
  V x;
  memcpy(&x, p, sizeof(x));
  return x;
}
QUEST_INLINE void store(float* p, V x) { memcpy(p, &x, sizeof(x)); }
QUEST_INLINE V operator+(V a, V b) { return {a.v + b.v}; }
QUEST_INLINE V operator-(V a, V b) { return {a.v - b.v}; }
QUEST_INLINE V operator*(V a, V b) { return {a.v * b.v}; }
QUEST_INLINE V fma(V a, V b, V c) { return {a.v * b.v + c.v}; }
// b where one of them is NaN.
QUEST_INLINE V max(V a, V b) { return {a.v > b.v ? a.v : b.v}; }
// 1.5 * 2^23: the unit in the last place of the sum is 1, so adding it rounds to the nearest
// integer.
constexpr float kRoundShift = 12582912.0f;
QUEST_INLINE V round(V x) { return {(x.v + kRoundShift) - kRoundShift}; }
// x * 2^n for n in [-127, 127], 0 for n = -127.
QUEST_INLINE V ldexp(V x, V n) {
  const UInt4 integer = bit_cast<UInt4>(n.v + kRoundShift) - bit_cast<uint32_t>(kRoundShift);
  return {x.v * bit_cast<Float4>((integer + 127u) << 23)};
}

// 4 float16.
QUEST_INLINE V widen(const Float16* p) {
  typedef uint16_t UShort4 __attribute__((vector_size(8)));
  UShort4 halves;
  memcpy(&halves, p, sizeof(halves));
  const UInt4 x = __builtin_convertvector(halves, UInt4);
  // The exponent is rebiased by a multiplication, which also makes subnormals normal.
  const UInt4 bits = bit_cast<UInt4>(bit_cast<Float4>((x & 0x7fffu) << 13) * 0x1p112f);
  const UInt4 is_special = bit_cast<UInt4>((x & 0x7c00u) == 0x7c00u);
  return {bit_cast<Float4>(bits | (is_special & 0x7f800000u) | (x & 0x8000u) << 16)};
}
QUEST_INLINE Float16 narrow_to_float16(float x) {
  const uint32_t sign = bit_cast<uint32_t>(x) & 0x80000000u;
  uint32_t bits = bit_cast<uint32_t>(x) ^ sign;
  uint32_t half;
  if (bits >= 0x47800000) {
    half = bits > 0x7f800000 ? 0x7e00 : 0x7c00;
  } else if (bits < 0x38800000) {
    // Subnormal: the addition shifts the mantissa into place and rounds it.
    half = bit_cast<uint32_t>(bit_cast<float>(bits) + 0.5f) - bit_cast<uint32_t>(0.5f);
  } else {
    half = (bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13;
  }
  return {static_cast<uint16_t>(half | sign >> 16)};
}
QUEST_INLINE BFloat16 narrow_to_bfloat16(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return {static_cast<uint16_t>(x == x ? rounded : 0x7fc0)};
}

QUEST_INLINE Pair load_pair(const float* p) { return {load(p), load(p + 4)}; }
QUEST_INLINE Pair load_pair(const BFloat16* p) {
  UInt4 x;
  memcpy(&x, p, sizeof(x));
  return {{bit_cast<Float4>(x << 16)}, {bit_cast<Float4>(x & 0xffff0000u)}};
}
QUEST_INLINE Pair load_pair(const Float16* p) { return {widen(p), widen(p + 4)}; }
// A pair is 8 elements wide and rows are multiples of 8: there is never a rest.
template <class T>
QUEST_INLINE Pair load_pair(const T* p, int) {
  return load_pair(p);
}

QUEST_INLINE void store_as(float* p, V x) { store(p, x); }
QUEST_INLINE void store_as(BFloat16* p, V x) {
  for (int i = 0; i < 4; ++i) p[i] = narrow_to_bfloat16(x.v[i]);
}
QUEST_INLINE void store_as(Float16* p, V x) {
  for (int i = 0; i < 4; ++i) p[i] = narrow_to_float16(x.v[i]);
}

// Lane i of the result joins the lanes of rows[i].
template <class Join>
QUEST_INLINE V join_rows(const V* rows, const Join& join) {
  const Float4 a = rows[0].v, b = rows[1].v, c = rows[2].v, d = rows[3].v;
  return join(join(V{Float4{a[0], b[0], c[0], d[0]}}, V{Float4{a[2], b[2], c[2], d[2]}}),
              join(V{Float4{a[1], b[1], c[1], d[1]}}, V{Float4{a[3], b[3], c[3], d[3]}}));
}

// Bit i: keys[i] > threshold, for kWidth keys.
QUEST_INLINE uint32_t mask_greater(const int32_t* keys, int32_t threshold) {
  uint32_t mask = 0;
  for (int i = 0; i < 4; ++i) mask |= static_cast<uint32_t>(keys[i] > threshold) << i;
  return mask;
}

}  // namespace QUEST_ISA
}  // namespace quest
