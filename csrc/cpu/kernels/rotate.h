// The rotation of keys and queries before sketches are made and scored: signs, then sums and
// differences over blocks of rotation_size channels.
#pragma once

#include "cpu/kernels/floats8.h"
#include "params.h"

namespace quest {
namespace QUEST_ISA {

constexpr int kMaxGroups = kMaxHeadDim / 8;  // channels are taken 8 at a time

struct Signs {
  uint32_t bits[kMaxHeadDim];
  constexpr Signs() : bits() {
    for (int d = 0; d < kMaxHeadDim; ++d) bits[d] = rotation_sign(d);
  }
};
constexpr Signs kSigns;

QUEST_INLINE Float8 flip(Float8 x, UInt8x32 signs) {
  return bit_cast<Float8>(bit_cast<UInt8x32>(x) ^ signs);
}

// Sums and differences of channels 1, 2 and 4 apart.
QUEST_INLINE Float8 rotate_8(Float8 x) {
  constexpr uint32_t s = 0x80000000;
  x = Float8{x[1], x[0], x[3], x[2], x[5], x[4], x[7], x[6]} +
      flip(x, UInt8x32{0, s, 0, s, 0, s, 0, s});
  x = Float8{x[2], x[3], x[0], x[1], x[6], x[7], x[4], x[5]} +
      flip(x, UInt8x32{0, 0, s, s, 0, 0, s, s});
  return Float8{x[4], x[5], x[6], x[7], x[0], x[1], x[2], x[3]} +
         flip(x, UInt8x32{0, 0, 0, 0, s, s, s, s});
}

inline void rotate(Float8* x, int num_groups) {
  for (int g = 0; g < num_groups; ++g) {
    UInt8x32 signs;
    memcpy(&signs, kSigns.bits + 8 * g, sizeof(signs));
    x[g] = rotate_8(flip(x[g], signs));
  }
  for (int step = 1; step < rotation_size(8 * num_groups) / 8; step *= 2) {
    for (int first = 0; first < num_groups; first += 2 * step) {
      for (int g = first; g < first + step; ++g) {
        const Float8 low = x[g], high = x[g + step];
        x[g] = low + high;
        x[g + step] = low - high;
      }
    }
  }
}

}  // namespace QUEST_ISA
}  // namespace quest
