// The float vector of the instruction-set level this file is compiled for, and what is built on it.
// Every name lives in the namespace QUEST_ISA: two levels never share a symbol.
#pragma once

#include <stdint.h>
#include <string.h>

#define QUEST_CONCAT_(a, b) a##b
#define QUEST_CONCAT(a, b) QUEST_CONCAT_(a, b)
#define QUEST_LEVEL_scalar 0
#define QUEST_LEVEL_avx2 1
#define QUEST_LEVEL_avx512 2
#define QUEST_LEVEL_avx512_bf16 3
#define QUEST_LEVEL_neon 4
#define QUEST_LEVEL QUEST_CONCAT(QUEST_LEVEL_, QUEST_ISA)

#define QUEST_UNROLL _Pragma("GCC unroll 16")
#define QUEST_UNROLL_4 _Pragma("GCC unroll 4")
#define QUEST_INLINE inline __attribute__((always_inline))

namespace quest {
namespace QUEST_ISA {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class To, class From>
QUEST_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

constexpr float kInfinity = __builtin_inff();

}  // namespace QUEST_ISA
}  // namespace quest

#if QUEST_LEVEL == 2 || QUEST_LEVEL == 3
#include "cpu/kernels/vec_avx512.h"
#elif QUEST_LEVEL == 1
#include "cpu/kernels/vec_avx2.h"
#elif QUEST_LEVEL == 4
#include "cpu/kernels/vec_neon.h"
#else
#include "cpu/kernels/vec_scalar.h"
#endif

namespace quest {
namespace QUEST_ISA {

// x, which compilers then take as it is: not loaded or summed anew in each use.
template <class T>
QUEST_INLINE T in_register(T x) {
#if defined(__x86_64__)
  asm("" : "+v"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}
// x, loaded once where it is used several times: compilers put the load into each use, and on
// vectors of 8 loads are what limits a dot product.
QUEST_INLINE V load_once(V x) {
#if QUEST_LEVEL == 1
  x.v = in_register(x.v);
#endif
  return x;
}

// Lane i of the result is the sum of the lanes of rows[i]; then the largest of them, without NaN.
QUEST_INLINE V reduce_rows(const V* rows) {
  return join_rows(rows, [](V a, V b) { return a + b; });
}
QUEST_INLINE V largest_of_rows(const V* rows) {
  return join_rows(rows, [](V a, V b) { return max(a, b); });
}

// load_pair(p) reads kPairWidth elements into two vectors, in an order of the element type's
// choice: element i is in lane pair_lane<T>(i) of the two. load_pair(p, n) reads n (a multiple of
// 8) only, the rest is zero.
constexpr int kPairWidth = 2 * kWidth;

// bfloat16 is widened by shifting and masking 32-bit lanes: even elements first, then odd ones.
template <class T>
constexpr int pair_lane(int i) {
  return i;
}
template <>
constexpr int pair_lane<BFloat16>(int i) {
  return i % 2 * kWidth + i / 2;
}

// 2^x for x <= 0, within 2 units in the last place; 0 below kExp2Floor; NaN for NaN. Coefficients:
// Cephes.
QUEST_INLINE V exp2(V x) {
  x = max(set1(kExp2Floor), x);
  const V n = round(x);
  const V f = x - n;
  V p = set1(1.535336188319500e-4f);
  p = fma(p, f, set1(1.339887440266574e-3f));
  p = fma(p, f, set1(9.618437357674640e-3f));
  p = fma(p, f, set1(5.550332471162809e-2f));
  p = fma(p, f, set1(2.402264791363012e-1f));
  p = fma(p, f, set1(6.931472028550421e-1f));
  p = fma(p, f, set1(1.0f));
  return ldexp(p, n);
}

// To the L2 cache.
QUEST_INLINE void prefetch(const void* p, int bytes) {
  for (int i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(p) + i, 0, 2);
}

}  // namespace QUEST_ISA
}  // namespace quest
