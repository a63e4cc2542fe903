// What a page weighs where a share of the weights decides: a whole number, without a rounding that
// could differ from device to device (quest_compile/ops/reference/selection.py).
#pragma once

#include <stdint.h>

#include "everywhere.h"

namespace quest {

// 2^30 * 2^-x for x >= 0: x in units of 2^-16, and a polynomial in integers, within 4e-6.
QUEST_EVERYWHERE int32_t softmax_weight(float x) {
  x = x > 0 ? x : 0;  // NaN, too
  const int32_t units = static_cast<int32_t>((x < 31 ? x : 31) * 65536);
  const int64_t rest = 65536 - (units & 65535);
  int64_t power = 7270536;
  power = 27946717 + (power * rest >> 16);
  power = 129584418 + (power * rest >> 16);
  power = 372069241 + (power * rest >> 16);
  power = (1 << 29) + (power * rest >> 16);
  return static_cast<int32_t>(power >> (units >> 16));
}

// Of a score that is a share: in units of 2^-24, up to 2^30, which NaN has, too.
QUEST_EVERYWHERE int32_t share_weight(float score) {
  const float units = score * 16777216.0f;
  if (units <= 0) return 0;
  return units < 1073741824.0f ? static_cast<int32_t>(units) : 1 << 30;
}

}  // namespace quest
