// 8 floats: AVX2, FMA, F16C.
#pragma once

#include <immintrin.h>

namespace quest {
namespace QUEST_ISA {

constexpr int kWidth = 8;
// Accumulators of a dot-product tile (dot.h): 16 registers hold no more with their operands.
constexpr int kTileSize = 8;
// Column pairs that H heads accumulate at a time (value.h).
constexpr int kValuePairs(int num_heads) { return num_heads == 4 ? 1 : num_heads == 2 ? 2 : 4; }
constexpr float kExp2Floor = -127.0f;

struct V {
  __m256 v;
};
struct Pair {
  V lo, hi;
};

QUEST_INLINE V zero() { return {_mm256_setzero_ps()}; }
QUEST_INLINE V set1(float x) { return {_mm256_set1_ps(x)}; }
QUEST_INLINE V load(const float* p) { return {_mm256_loadu_ps(p)}; }
QUEST_INLINE void store(float* p, V x) { _mm256_storeu_ps(p, x.v); }
QUEST_INLINE V operator+(V a, V b) { return {_mm256_add_ps(a.v, b.v)}; }
QUEST_INLINE V operator-(V a, V b) { return {_mm256_sub_ps(a.v, b.v)}; }
QUEST_INLINE V operator*(V a, V b) { return {_mm256_mul_ps(a.v, b.v)}; }
QUEST_INLINE V fma(V a, V b, V c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
// b where one of them is NaN.
QUEST_INLINE V max(V a, V b) { return {_mm256_max_ps(a.v, b.v)}; }
QUEST_INLINE V round(V x) {
  return {_mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// x * 2^n for n in [-127, 127], 0 for n = -127.
QUEST_INLINE V ldexp(V x, V n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
  return {_mm256_mul_ps(x.v, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)))};
}

QUEST_INLINE __m128i load_8(const void* p) {
  return _mm_loadu_si128(static_cast<const __m128i*>(p));
}

QUEST_INLINE Pair load_pair(const float* p) { return {load(p), load(p + 8)}; }
QUEST_INLINE Pair load_pair(const float* p, int) { return {load(p), zero()}; }
QUEST_INLINE Pair widen(__m256i bf16) {
  return {{_mm256_castsi256_ps(_mm256_slli_epi32(bf16, 16))},
          {_mm256_castsi256_ps(_mm256_and_si256(bf16, _mm256_set1_epi32(0xffff0000)))}};
}
QUEST_INLINE Pair load_pair(const BFloat16* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
QUEST_INLINE Pair load_pair(const BFloat16* p, int) {
  return widen(_mm256_zextsi128_si256(load_8(p)));
}
QUEST_INLINE Pair load_pair(const Float16* p) {
  return {{_mm256_cvtph_ps(load_8(p))}, {_mm256_cvtph_ps(load_8(p + 8))}};
}
QUEST_INLINE Pair load_pair(const Float16* p, int) {
  return {{_mm256_cvtph_ps(load_8(p))}, zero()};
}

QUEST_INLINE void store_as(float* p, V x) { store(p, x); }
QUEST_INLINE void store_as(BFloat16* p, V x) {
  const __m256i bits = _mm256_castps_si256(x.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
  rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan);
  const __m256i words = _mm256_srli_epi32(rounded, 16);
  _mm_storeu_si128(
      reinterpret_cast<__m128i*>(p),
      _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
QUEST_INLINE void store_as(Float16* p, V x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
}

// Lane i of the result joins the lanes of rows[i].
template <class Join>
QUEST_INLINE V join_rows(const V* rows, const Join& join) {
  V a[4], b[2];
  QUEST_UNROLL
  for (int i = 0; i < 4; ++i) {
    const __m256 x = rows[2 * i].v, y = rows[2 * i + 1].v;
    a[i] = join(V{_mm256_unpacklo_ps(x, y)}, V{_mm256_unpackhi_ps(x, y)});
  }
  QUEST_UNROLL
  for (int i = 0; i < 2; ++i) {
    const __m256d x = _mm256_castps_pd(a[2 * i].v), y = _mm256_castps_pd(a[2 * i + 1].v);
    b[i] = join(V{_mm256_castpd_ps(_mm256_unpacklo_pd(x, y))},
                V{_mm256_castpd_ps(_mm256_unpackhi_pd(x, y))});
  }
  return join(V{_mm256_permute2f128_ps(b[0].v, b[1].v, 0x20)},
              V{_mm256_permute2f128_ps(b[0].v, b[1].v, 0x31)});
}

// Bit i: keys[i] > threshold, for kWidth keys.
QUEST_INLINE uint32_t mask_greater(const int32_t* keys, int32_t threshold) {
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys));
  const __m256i greater = _mm256_cmpgt_epi32(x, _mm256_set1_epi32(threshold));
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(greater)));
}

}  // namespace QUEST_ISA
}  // namespace quest
