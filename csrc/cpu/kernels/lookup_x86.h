// lookup.h for AVX-512 and AVX2: half bytes pick entries by byte shuffles, 16 tokens in 128 bits.
#pragma once

#include "cpu/kernels/lookup.h"

namespace quest {
namespace QUEST_ISA {

#if QUEST_LEVEL == 2 || QUEST_LEVEL == 3
// even, odd: 16-bit sums of even and odd tokens in two lanes each, to be added.
QUEST_INLINE __m256i join_tokens(__m256i even, __m256i odd) {
  const __m256i low = _mm256_unpacklo_epi16(even, odd), high = _mm256_unpackhi_epi16(even, odd);
  return _mm256_add_epi16(_mm256_permute2x128_si256(low, high, 0x20),
                          _mm256_permute2x128_si256(low, high, 0x31));
}

QUEST_INLINE __m512i load_signs(const uint8_t* bits, int first, int num_bytes, int width) {
  const int left = num_bytes - first;
  if (width == 16) {
    const __mmask8 mask = left >= 4 ? 255 : static_cast<__mmask8>((1 << 2 * left) - 1);
    return _mm512_maskz_loadu_epi64(mask, bits + 16 * first);
  }
  const __mmask8 mask = left >= 4 ? 15 : static_cast<__mmask8>((1 << left) - 1);
  const __m512i x = _mm512_castsi256_si512(_mm256_maskz_loadu_epi64(mask, bits + 8 * first));
  return _mm512_maskz_permutexvar_epi64(0x55, _mm512_set_epi64(3, 3, 2, 2, 1, 1, 0, 0), x);
}

template <int kBytes>
QUEST_INLINE void sum_page_signs(const SignTables& tables, const uint8_t* bits, int num_bytes,
                                 int width, Sixteen& out) {
  const __m512i half = _mm512_set1_epi8(15), byte = _mm512_set1_epi16(255);
  __m512i even[2], odd[2];
  QUEST_UNROLL
  for (int part = 0; part < 2; ++part) even[part] = odd[part] = _mm512_setzero_si512();
  const int end = kBytes > 0 ? kBytes : num_bytes;
  QUEST_UNROLL
  for (int j = 0; j < end; j += 8) {
    __m512i sums[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    QUEST_UNROLL
    for (int i = j; i < j + 8; i += 4) {
      if (kBytes == 0 && i >= end) break;
      const __m512i x = kBytes > 0 && width == 16 ? _mm512_loadu_si512(bits + 16 * i)
                                                  : load_signs(bits, i, end, width);
      const __m512i low = _mm512_and_si512(x, half);
      const __m512i high = _mm512_and_si512(_mm512_srli_epi16(x, 4), half);
      QUEST_UNROLL
      for (int part = 0; part < 2; ++part) {
        const __m512i a = _mm512_shuffle_epi8(_mm512_load_si512(tables.parts[part][0][i]), low);
        const __m512i b = _mm512_shuffle_epi8(_mm512_load_si512(tables.parts[part][1][i]), high);
        sums[part] = _mm512_add_epi8(sums[part], _mm512_add_epi8(a, b));
      }
    }
    QUEST_UNROLL
    for (int part = 0; part < 2; ++part) {
      even[part] = _mm512_add_epi16(even[part], _mm512_and_si512(sums[part], byte));
      odd[part] = _mm512_add_epi16(odd[part], _mm512_srli_epi16(sums[part], 8));
    }
  }
  const auto fold = [](const __m512i* parts) {
    const __m512i x = _mm512_add_epi16(parts[0], _mm512_slli_epi16(parts[1], 6));
    return _mm256_add_epi16(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
  };
  const __m256i totals = join_tokens(fold(even), fold(odd));
  out[0].v = _mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(totals));
}

QUEST_INLINE V dot_codes(const int8_t* codes, const int16_t* weights, int size) {
  __m512i sum = _mm512_setzero_si512();
  for (int i = 0; i < size; i += 32) {
    const int left = size - i;
    const __mmask32 mask = left >= 32 ? 0xffffffffu : (1u << left) - 1;
    const __m512i x = _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(mask, codes + i));
    sum = _mm512_add_epi32(sum, _mm512_madd_epi16(x, _mm512_load_si512(weights + i)));
  }
  return {_mm512_cvtepi32_ps(sum)};
}

QUEST_INLINE void load_codes(const uint8_t* codes, Sixteen& out) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
  out[0].v = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(x));
}

QUEST_INLINE V largest_of_rows(const V* rows) {
  __m512 a[8], b[4], c[2];
  QUEST_UNROLL
  for (int i = 0; i < 8; ++i) {
    a[i] = _mm512_max_ps(_mm512_unpacklo_ps(rows[2 * i].v, rows[2 * i + 1].v),
                         _mm512_unpackhi_ps(rows[2 * i].v, rows[2 * i + 1].v));
  }
  QUEST_UNROLL
  for (int i = 0; i < 4; ++i) {
    const __m512d x = _mm512_castps_pd(a[2 * i]), y = _mm512_castps_pd(a[2 * i + 1]);
    b[i] = _mm512_max_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)),
                         _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  }
  QUEST_UNROLL
  for (int i = 0; i < 2; ++i) {
    c[i] = _mm512_max_ps(_mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x88),
                         _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xdd));
  }
  return {_mm512_max_ps(_mm512_shuffle_f32x4(c[0], c[1], 0x88),
                        _mm512_shuffle_f32x4(c[0], c[1], 0xdd))};
}

#else
QUEST_INLINE __m256i load_signs(const uint8_t* bits, int first, int num_bytes, int width) {
  const uint8_t* p = bits + width * first;
  if (first + 2 > num_bytes) {
    return _mm256_zextsi128_si256(
        width == 16 ? load_8(p) : _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  return width == 16 ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))
                     : _mm256_permute4x64_epi64(_mm256_castsi128_si256(load_8(p)), 0x10);
}

template <int kBytes, int kPages>
QUEST_INLINE void sum_signs(const SignTables& tables, const uint8_t* const (&bits)[kPages],
                            int num_bytes, int width, Sixteen (&out)[kPages]) {
  const __m256i half = _mm256_set1_epi8(15), units = _mm256_set1_epi16(64 << 8 | 1);
  const int end = kBytes > 0 ? kBytes : num_bytes;
  __m256i first[kPages], last[kPages];  // tokens of a lane, in two lanes to be added
  QUEST_UNROLL
  for (int k = 0; k < kPages; ++k) first[k] = last[k] = _mm256_setzero_si256();
  QUEST_UNROLL
  for (int j = 0; j < end; j += 4) {
    __m256i sums[2][kPages];
    QUEST_UNROLL
    for (int i = j; i < j + 4; i += 2) {
      if (i >= end) break;
      __m256i index[2][kPages];
      QUEST_UNROLL
      for (int k = 0; k < kPages; ++k) {
        __m256i x = kBytes > 0 && width == 16
                        ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bits[k] + 16 * i))
                        : load_signs(bits[k], i, end, width);
        // Loads are what there is most of: not to be loaded twice.
        asm("" : "+x"(x));
        index[0][k] = _mm256_and_si256(x, half);
        index[1][k] = _mm256_and_si256(_mm256_srli_epi16(x, 4), half);
      }
      QUEST_UNROLL
      for (int h = 0; h < 2; ++h) {
        QUEST_UNROLL
        for (int part = 0; part < 2; ++part) {
          const auto* p = reinterpret_cast<const __m256i*>(tables.parts[part][h][i]);
          const __m256i table = _mm256_load_si256(p);
          QUEST_UNROLL
          for (int k = 0; k < kPages; ++k) {
            const __m256i x = _mm256_shuffle_epi8(table, index[h][k]);
            sums[part][k] = i == j && h == 0 ? x : _mm256_add_epi8(sums[part][k], x);
          }
        }
      }
    }
    QUEST_UNROLL
    for (int k = 0; k < kPages; ++k) {
      const __m256i low = _mm256_unpacklo_epi8(sums[0][k], sums[1][k]);
      const __m256i high = _mm256_unpackhi_epi8(sums[0][k], sums[1][k]);
      first[k] = _mm256_add_epi16(first[k], _mm256_maddubs_epi16(low, units));
      last[k] = _mm256_add_epi16(last[k], _mm256_maddubs_epi16(high, units));
    }
  }
  const auto widen = [](__m256i x) {
    const __m128i sums = _mm_add_epi16(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    return _mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(sums));
  };
  QUEST_UNROLL
  for (int k = 0; k < kPages; ++k) {
    out[k][0].v = widen(first[k]);
    out[k][1].v = widen(last[k]);
  }
}

QUEST_INLINE V dot_codes(const int8_t* codes, const int16_t* weights, int size) {
  __m256i sum = _mm256_setzero_si256();
  for (int i = 0; i < size; i += 16) {
    const __m128i x = size - i >= 16 ? load_8(codes + i)
                                     : _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i));
    const __m256i w = _mm256_load_si256(reinterpret_cast<const __m256i*>(weights + i));
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_cvtepi8_epi16(x), w));
  }
  return {_mm256_cvtepi32_ps(sum)};
}

QUEST_INLINE void load_codes(const uint8_t* codes, Sixteen& out) {
  const __m128i x = load_8(codes);
  out[0].v = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(x));
  out[1].v = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(x, 8)));
}

QUEST_INLINE V largest_of_rows(const V* rows) {
  __m256 b[2];
  QUEST_UNROLL
  for (int i = 0; i < 2; ++i) {
    const V* r = rows + 4 * i;
    const __m256d x = _mm256_castps_pd(
        _mm256_max_ps(_mm256_unpacklo_ps(r[0].v, r[1].v), _mm256_unpackhi_ps(r[0].v, r[1].v)));
    const __m256d y = _mm256_castps_pd(
        _mm256_max_ps(_mm256_unpacklo_ps(r[2].v, r[3].v), _mm256_unpackhi_ps(r[2].v, r[3].v)));
    b[i] = _mm256_max_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(x, y)),
                         _mm256_castpd_ps(_mm256_unpackhi_pd(x, y)));
  }
  return {_mm256_max_ps(_mm256_permute2f128_ps(b[0], b[1], 0x20),
                        _mm256_permute2f128_ps(b[0], b[1], 0x31))};
}
#endif

}  // namespace QUEST_ISA
}  // namespace quest
