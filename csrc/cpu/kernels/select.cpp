// The page_budget best pages, in ascending order, without sorting.
//
// 1. A key per page: an integer in the order of the scores, with forced pages above all and dead
// pages
//    below. 2. The smallest threshold that no more than page_budget keys exceed, by bisection. 3.
//    The pages above it, and as many as there is room for of those at it, lowest index first.
#include "cpu/kernels/vec.h"
#include "params.h"

namespace quest {
namespace QUEST_ISA {
namespace {

constexpr int32_t kForced = INT32_MAX;
constexpr int32_t kNaN = INT32_MAX - 1;
constexpr int32_t kDead = INT32_MIN;

int32_t count_greater(const int32_t* keys, int32_t num_keys, int32_t threshold) {
  int32_t count = 0;
  for (int32_t i = 0; i < num_keys; ++i) count += keys[i] > threshold;
  return count;
}

void make_keys(const float* scores, int32_t num_pages, int32_t* keys) {
  for (int32_t i = 0; i < num_pages; ++i) {
    const float score = scores[i] + 0.0f;  // -0 and +0 are equal
    const int32_t bits = bit_cast<int32_t>(score);
    const int32_t key = bits ^ ((bits >> 31) & INT32_MAX);
    keys[i] = score == score ? key : kNaN;
  }
  for (int32_t i = num_pages; i < num_pages + kKeyPadding; ++i) keys[i] = kDead;
}

void force_pages(const SelectParams& p) {
  int32_t* keys = p.keys;
  for (int32_t page = 0, sinks = 0; page < p.num_pages && sinks < p.num_sink_pages; ++page) {
    if (keys[page] == kDead) continue;
    keys[page] = kForced;
    ++sinks;
  }
  const int32_t first_recent = p.num_pages - p.num_recent_pages;
  for (int32_t page = first_recent > 0 ? first_recent : 0; page < p.num_pages; ++page) {
    if (keys[page] != kDead) keys[page] = kForced;
  }
}

// The smallest threshold exceeded by at most `budget` keys.
int32_t find_threshold(const int32_t* keys, int32_t num_keys, int32_t budget) {
  int64_t low = kDead;  // exceeded by more than `budget` keys, except at first
  if (count_greater(keys, num_keys, kDead) <= budget) return kDead;
  int64_t high = INT32_MAX;  // exceeded by at most `budget` keys
  while (high - low > 1) {
    const int64_t middle = (low + high) >> 1;
    const int32_t count = count_greater(keys, num_keys, static_cast<int32_t>(middle));
    if (count == budget) return static_cast<int32_t>(middle);
    (count > budget ? low : high) = middle;
  }
  return static_cast<int32_t>(high);
}

// Writes the pages whose keys exceed `threshold`, and the first `num_ties` of those that equal it.
int32_t write_pages(const int32_t* keys, int32_t num_pages, int32_t threshold, int32_t num_ties,
                    int32_t* page_indices) {
  int32_t count = 0;
  for (int32_t first = 0; first < num_pages; first += kWidth) {
    uint32_t chosen = mask_greater(keys + first, threshold);
    if (num_ties > 0) {
      uint32_t ties = mask_greater(keys + first, threshold - 1) & ~chosen;
      for (; ties && num_ties > 0; --num_ties) {
        chosen |= ties & -ties;
        ties &= ties - 1;
      }
    }
    for (; chosen; chosen &= chosen - 1) page_indices[count++] = first + __builtin_ctz(chosen);
  }
  return count;
}

}  // namespace

int32_t select_pages(const SelectParams& p) {
  make_keys(p.scores, p.num_pages, p.keys);
  if (p.live) {
    for (int32_t page = 0; page < p.num_pages; ++page) {
      if (!p.live[page]) p.keys[page] = kDead;
    }
  }
  force_pages(p);
  const int32_t num_keys = (p.num_pages + kKeyPadding - 1) / kKeyPadding * kKeyPadding;
  const int32_t threshold = find_threshold(p.keys, num_keys, p.page_budget);
  const int32_t above = count_greater(p.keys, num_keys, threshold);
  const int32_t num_ties = threshold == kDead ? 0 : p.page_budget - above;
  return write_pages(p.keys, p.num_pages, threshold, num_ties, p.page_indices);
}

}  // namespace QUEST_ISA
}  // namespace quest
