// Integer dot products of a page's sketch with queries.
#pragma once

#include "cpu/kernels/sketch_query.h"

namespace quest {
namespace QUEST_ISA {

// A byte for each of 4 channels of kWidth tokens.
typedef uint32_t Words __attribute__((vector_size(4 * kWidth)));

// Sums add products of unsigned bytes, at most 3, and the 4 codes of a query; total(sums) is that
// of each token. At least kMaxBlocks blocks of channels fit.
constexpr int kMaxBlocks = 4;
// Vectors of tokens that are summed side by side.
constexpr int kVectors = QUEST_LEVEL == 2 || QUEST_LEVEL == 3 ? 1 : 2;

QUEST_INLINE int32_t load_word(const int8_t* codes) {
  int32_t word;
  memcpy(&word, codes, sizeof(word));
  return word;
}

#if QUEST_LEVEL == 3

using Sums = __m512i;
QUEST_INLINE Sums no_sums() { return _mm512_setzero_si512(); }
QUEST_INLINE Sums add_products(Sums sums, Words bytes, int32_t codes) {
  return _mm512_dpbusd_epi32(sums, (__m512i)bytes, _mm512_set1_epi32(codes));
}
QUEST_INLINE V total(Sums sums) { return {_mm512_cvtepi32_ps(sums)}; }

// The sum of the lanes is the dot product. Reads whole lines: the mean begins and a row ends with
// one.
QUEST_INLINE V dot_mean(const int8_t* mean, const SketchQuery& query, int head_dim) {
  // Bytes are 128 too large.
  __m512i sum = _mm512_zextsi128_si512(_mm_cvtsi32_si128(-128 * query.sum));
  for (int d = 0; d < head_dim; d += 64) {
    const __m512i x = _mm512_xor_si512(_mm512_loadu_si512(mean + d), _mm512_set1_epi8(-128));
    sum = _mm512_dpbusd_epi32(sum, x, _mm512_load_si512(query.codes + d));
  }
  return {_mm512_cvtepi32_ps(sum)};
}

#elif QUEST_LEVEL == 2

using Sums = __m512i;  // 16 bits
QUEST_INLINE Sums no_sums() { return _mm512_setzero_si512(); }
QUEST_INLINE Sums add_products(Sums sums, Words bytes, int32_t codes) {
  return _mm512_add_epi16(sums, _mm512_maddubs_epi16((__m512i)bytes, _mm512_set1_epi32(codes)));
}
QUEST_INLINE V total(Sums sums) {
  return {_mm512_cvtepi32_ps(_mm512_madd_epi16(sums, _mm512_set1_epi16(1)))};
}

QUEST_INLINE V dot_mean(const int8_t* mean, const SketchQuery& query, int head_dim) {
  __m512i sum = _mm512_setzero_si512();
  for (int d = 0; d < head_dim; d += 32) {
    const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(mean + d));
    const __m512i x = _mm512_cvtepi8_epi16(codes);
    sum = _mm512_add_epi32(sum, _mm512_madd_epi16(x, _mm512_load_si512(query.words + d)));
  }
  return {_mm512_cvtepi32_ps(sum)};
}

#elif QUEST_LEVEL == 1

using Sums = __m256i;  // 16 bits
QUEST_INLINE Sums no_sums() { return _mm256_setzero_si256(); }
QUEST_INLINE Sums add_products(Sums sums, Words bytes, int32_t codes) {
  return _mm256_add_epi16(sums, _mm256_maddubs_epi16((__m256i)bytes, _mm256_set1_epi32(codes)));
}
QUEST_INLINE V total(Sums sums) {
  return {_mm256_cvtepi32_ps(_mm256_madd_epi16(sums, _mm256_set1_epi16(1)))};
}

QUEST_INLINE V dot_mean(const int8_t* mean, const SketchQuery& query, int head_dim) {
  __m256i sum = _mm256_setzero_si256();
  for (int d = 0; d < head_dim; d += 16) {
    const __m256i x = _mm256_cvtepi8_epi16(load_8(mean + d));
    const __m256i* words = reinterpret_cast<const __m256i*>(query.words + d);
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(x, _mm256_load_si256(words)));
  }
  return {_mm256_cvtepi32_ps(sum)};
}

#else

#if defined(__ARM_FEATURE_DOTPROD)
using Sums = int32x4_t;
QUEST_INLINE Sums no_sums() { return vdupq_n_s32(0); }
QUEST_INLINE Sums add_products(Sums sums, Words bytes, int32_t codes) {
  return vdotq_s32(sums, (int8x16_t)bytes, vreinterpretq_s8_s32(vdupq_n_s32(codes)));
}
QUEST_INLINE V total(Sums sums) { return {vcvtq_f32_s32(sums)}; }
#else
typedef int16_t Sums __attribute__((vector_size(16)));
QUEST_INLINE Sums no_sums() { return Sums{}; }
QUEST_INLINE Sums add_products(Sums sums, Words bytes, int32_t codes) {
  const Sums x = (Sums)bytes, y = (Sums)(Words{} + static_cast<uint32_t>(codes));
  return sums + (x & 255) * ((y << 8) >> 8) + (x >> 8) * (y >> 8);
}
QUEST_INLINE V total(Sums s) {
  V out;
  for (int i = 0; i < 4; ++i) out.v[i] = static_cast<float>(s[2 * i] + s[2 * i + 1]);
  return out;
}
#endif

QUEST_INLINE V dot_mean(const int8_t* mean, const SketchQuery& query, int head_dim) {
  int32_t sum = 0;
  for (int d = 0; d < head_dim; ++d) sum += mean[d] * query.words[d];
  const float lanes[kWidth] = {static_cast<float>(sum)};
  return load(lanes);
}

#endif

// Adds a block of channels: words [kVectors] of both planes; codes [kHeads] of the block.
template <int kHeads, int kBits>
QUEST_INLINE void add_block(const Words* first, const Words* second, const int8_t* const* codes,
                            Sums (*sums)[kVectors]) {
  // With two bits: those of a channel side by side, of even and of odd channels.
  Words pairs[2][kVectors];
  if (kBits == 2) {
    QUEST_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      pairs[0][v] = (first[v] & 0x55555555) << 1 | (second[v] & 0x55555555);
      pairs[1][v] = (first[v] & 0xaaaaaaaa) | (second[v] >> 1 & 0x55555555);
    }
  }
  QUEST_UNROLL
  for (int j = 0; j < 8; ++j) {
    Words bytes[kVectors];
    QUEST_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      bytes[v] =
          kBits == 2 ? pairs[j % 2][v] >> (j / 2 * 2) & 0x03030303 : first[v] >> j & 0x01010101;
    }
    QUEST_UNROLL
    for (int h = 0; h < kHeads; ++h) {
      const int32_t word = load_word(codes[h] + 4 * j);
      QUEST_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        // One sum each: compilers would sum by pairs, which takes more registers than there are.
        sums[h][v] = in_register(add_products(sums[h][v], bytes[v], word));
      }
    }
  }
}

// out[h][i]: bits . codes of the tokens of a tile. Planes: those of the tile.
template <int kHeads, int kBits>
QUEST_INLINE void dot_tile(const char* first, const char* second, int num_blocks,
                           const SketchQuery* queries, V (*out)[kSketchTile / kWidth]) {
  QUEST_UNROLL
  for (int v = 0; v < kSketchTile / kWidth; v += kVectors) {
    QUEST_UNROLL
    for (int i = 0; i < kHeads * kVectors; ++i) out[i / kVectors][v + i % kVectors] = zero();
    for (int begin = 0; begin < num_blocks; begin += kMaxBlocks) {
      const int end = begin + kMaxBlocks < num_blocks ? begin + kMaxBlocks : num_blocks;
      Sums sums[kHeads][kVectors];
      QUEST_UNROLL
      for (int i = 0; i < kHeads * kVectors; ++i) sums[i / kVectors][i % kVectors] = no_sums();
      for (int block = begin; block < end; ++block) {
        const int place = block * kSketchLine + v * 4 * kWidth;
        Words planes[2][kVectors];
        QUEST_UNROLL
        for (int i = 0; i < kVectors; ++i) {
          memcpy(&planes[0][i], first + place + i * 4 * kWidth, sizeof(Words));
          if (kBits == 2) memcpy(&planes[1][i], second + place + i * 4 * kWidth, sizeof(Words));
        }
        const int8_t* codes[kHeads];
        QUEST_UNROLL
        for (int h = 0; h < kHeads; ++h) codes[h] = queries[h].codes + block * kSketchBlock;
        add_block<kHeads, kBits>(planes[0], planes[1], codes, sums);
      }
      QUEST_UNROLL
      for (int h = 0; h < kHeads; ++h) {
        QUEST_UNROLL
        for (int i = 0; i < kVectors; ++i) out[h][v + i] = out[h][v + i] + total(sums[h][i]);
      }
    }
  }
}

}  // namespace QUEST_ISA
}  // namespace quest
