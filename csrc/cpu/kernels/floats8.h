// 8 floats on every machine, for rows that have the same bits on all of them.
#pragma once

#include "cpu/kernels/vec.h"

namespace quest {
namespace QUEST_ISA {

typedef float Float8 __attribute__((vector_size(32)));
typedef int32_t Int8x32 __attribute__((vector_size(32)));
typedef uint32_t UInt8x32 __attribute__((vector_size(32)));

QUEST_INLINE Float8 load_floats(const void* p) {
  Float8 x;
  memcpy(&x, p, sizeof(x));
  return x;
}
QUEST_INLINE void store_floats(void* p, Float8 x) { memcpy(p, &x, sizeof(x)); }
QUEST_INLINE Float8 all(float x) { return Float8{x, x, x, x, x, x, x, x}; }
QUEST_INLINE Float8 load_keys(const float* p) { return load_floats(p); }
QUEST_INLINE Float8 load_keys(const BFloat16* p) {
  typedef uint16_t UShort8 __attribute__((vector_size(16)));
  UShort8 x;
  memcpy(&x, p, sizeof(x));
  return bit_cast<Float8>(__builtin_convertvector(x, UInt8x32) << 16);
}
QUEST_INLINE Float8 load_keys(const Float16* p) {
#if QUEST_LEVEL >= 1 && QUEST_LEVEL <= 3
  return (Float8)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  float values[8];
  const Pair x = load_pair(p);
  store(values, x.lo);
  store(values + 4, x.hi);
  return load_floats(values);
#endif
}

}  // namespace QUEST_ISA
}  // namespace quest
