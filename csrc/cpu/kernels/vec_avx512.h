// 16 floats: AVX-512 F, BW, CD, DQ, VL.
#pragma once

// GCC 12 warns of its own _mm512_undefined_*(): https://gcc.gnu.org/bugzilla/show_bug.cgi?id=105593
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop

namespace quest {
namespace QUEST_ISA {

constexpr int kWidth = 16;
// Accumulators of a dot-product tile (dot.h).
constexpr int kTileSize = 16;
// Column pairs that H heads accumulate at a time (value.h).
constexpr int kValuePairs(int num_heads) { return num_heads == 4 ? 2 : 4; }
constexpr float kExp2Floor = -160.0f;

struct V {
  __m512 v;
};
struct Pair {
  V lo, hi;
};

QUEST_INLINE V zero() { return {_mm512_setzero_ps()}; }
QUEST_INLINE V set1(float x) { return {_mm512_set1_ps(x)}; }
QUEST_INLINE V load(const float* p) { return {_mm512_loadu_ps(p)}; }
QUEST_INLINE void store(float* p, V x) { _mm512_storeu_ps(p, x.v); }
QUEST_INLINE V operator+(V a, V b) { return {_mm512_add_ps(a.v, b.v)}; }
QUEST_INLINE V operator-(V a, V b) { return {_mm512_sub_ps(a.v, b.v)}; }
QUEST_INLINE V operator*(V a, V b) { return {_mm512_mul_ps(a.v, b.v)}; }
QUEST_INLINE V fma(V a, V b, V c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// b where one of them is NaN.
QUEST_INLINE V max(V a, V b) { return {_mm512_max_ps(a.v, b.v)}; }
QUEST_INLINE V round(V x) { return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT)}; }
// x * 2^n
QUEST_INLINE V ldexp(V x, V n) { return {_mm512_scalef_ps(x.v, n.v)}; }

QUEST_INLINE __mmask16 lanes_below(int n) {
  return static_cast<__mmask16>(n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1);
}

QUEST_INLINE Pair load_pair(const float* p) { return {load(p), load(p + 16)}; }
QUEST_INLINE Pair load_pair(const float* p, int n) {
  return {{_mm512_maskz_loadu_ps(lanes_below(n), p)},
          {_mm512_maskz_loadu_ps(lanes_below(n - 16), p + 16)}};
}
QUEST_INLINE Pair widen(__m512i bf16) {
  return {{_mm512_castsi512_ps(_mm512_slli_epi32(bf16, 16))},
          {_mm512_castsi512_ps(_mm512_and_si512(bf16, _mm512_set1_epi32(0xffff0000)))}};
}
QUEST_INLINE __m512i load_words(const BFloat16* p, int n) {
  return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((1ull << n) - 1), p);
}
QUEST_INLINE Pair load_pair(const BFloat16* p) { return widen(_mm512_loadu_si512(p)); }
QUEST_INLINE Pair load_pair(const BFloat16* p, int n) { return widen(load_words(p, n)); }
QUEST_INLINE Pair load_pair(const Float16* p) {
  const __m256i* q = reinterpret_cast<const __m256i*>(p);
  return {{_mm512_cvtph_ps(_mm256_loadu_si256(q))}, {_mm512_cvtph_ps(_mm256_loadu_si256(q + 1))}};
}
QUEST_INLINE Pair load_pair(const Float16* p, int n) {
  return {{_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes_below(n), p))},
          {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes_below(n - 16), p + 16))}};
}

QUEST_INLINE void store_as(float* p, V x) { store(p, x); }
QUEST_INLINE void store_as(BFloat16* p, V x) {
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
QUEST_INLINE void store_as(Float16* p, V x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
}

// Lane i of the result joins the lanes of rows[i].
template <class Join>
QUEST_INLINE V join_rows(const V* rows, const Join& join) {
  V a[8], b[4], c[2];
  QUEST_UNROLL
  for (int i = 0; i < 8; ++i) {
    const __m512 x = rows[2 * i].v, y = rows[2 * i + 1].v;
    a[i] = join(V{_mm512_unpacklo_ps(x, y)}, V{_mm512_unpackhi_ps(x, y)});
  }
  QUEST_UNROLL
  for (int i = 0; i < 4; ++i) {
    const __m512d x = _mm512_castps_pd(a[2 * i].v), y = _mm512_castps_pd(a[2 * i + 1].v);
    b[i] = join(V{_mm512_castpd_ps(_mm512_unpacklo_pd(x, y))},
                V{_mm512_castpd_ps(_mm512_unpackhi_pd(x, y))});
  }
  QUEST_UNROLL
  for (int i = 0; i < 2; ++i) {
    const __m512 x = b[2 * i].v, y = b[2 * i + 1].v;
    c[i] = join(V{_mm512_shuffle_f32x4(x, y, 0x88)}, V{_mm512_shuffle_f32x4(x, y, 0xdd)});
  }
  return join(V{_mm512_shuffle_f32x4(c[0].v, c[1].v, 0x88)},
              V{_mm512_shuffle_f32x4(c[0].v, c[1].v, 0xdd)});
}

// Bit i: keys[i] > threshold, for kWidth keys.
QUEST_INLINE uint32_t mask_greater(const int32_t* keys, int32_t threshold) {
  return _mm512_cmpgt_epi32_mask(_mm512_loadu_si512(keys), _mm512_set1_epi32(threshold));
}

}  // namespace QUEST_ISA
}  // namespace quest
