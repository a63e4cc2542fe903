// The row_budget best pages, in ascending order, without sorting.
//
// 1. A key per page: an integer in the order of scores, forced pages above all, dead ones below.
// 2. The smallest threshold that no more than row_budget keys exceed, by bisection.
// 3. The pages above it, and as many as there is room for of those at it, lowest index first.
//
// top_p counts, before that, how many of the best pages that are not forced have that share of the
// weights, which are integers: sums of them depend on no order.
#include "cpu/kernels/vec.h"
#include "params.h"
#include "softmax_weight.h"

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
  const int64_t num_sinks = p.selection.num_sink_pages;
  for (int32_t page = 0, sinks = 0; page < p.num_pages && sinks < num_sinks; ++page) {
    if (keys[page] == kDead) continue;
    keys[page] = kForced;
    ++sinks;
  }
  const int64_t first_recent = p.num_pages - p.selection.num_recent_pages;
  for (int64_t page = first_recent > 0 ? first_recent : 0; page < p.num_pages; ++page) {
    if (keys[page] != kDead) keys[page] = kForced;
  }
}

bool is_candidate(int32_t key) { return key != kForced && key != kDead; }

// Returns the sum. NaN has the largest weight there is.
int64_t weigh_pages(const SelectParams& p) {
  float best = -kInfinity;
  for (int32_t page = 0; page < p.num_pages; ++page) {
    if (is_candidate(p.keys[page]) && p.scores[page] > best) best = p.scores[page];
  }
  const bool are_shares = p.selection.group_reduce == GroupReduce::kSoftmax;
  int64_t total = 0;
  for (int32_t page = 0; page < p.num_pages; ++page) {
    const float score = p.scores[page];
    const bool is_best = score == best || score != score;
    const float distance = is_best ? 0 : (best - score) * p.selection.log2_scale;
    const int32_t weight = are_shares ? share_weight(score) : softmax_weight(distance);
    p.weights[page] = is_candidate(p.keys[page]) ? weight : 0;
    total += p.weights[page];
  }
  return total;
}

int64_t weight_above(const SelectParams& p, int64_t threshold) {
  int64_t sum = 0;
  for (int32_t page = 0; page < p.num_pages; ++page) {
    if (p.keys[page] > threshold) sum += p.weights[page];
  }
  return sum;
}

// How many pages are forced or have less than top_p of all weight before them, best first.
int32_t count_top_p(const SelectParams& p, int32_t num_keys) {
  const int64_t total = weigh_pages(p);
  if (total == 0) return count_greater(p.keys, num_keys, kForced - 1);
  const double wanted = p.selection.top_p * static_cast<double>(total);
  // The lowest key with less than that above it. Forced pages weigh nothing.
  int64_t low = kDead, high = kForced;
  while (high - low > 1) {
    const int64_t middle = (low + high) >> 1;
    (static_cast<double>(weight_above(p, middle)) < wanted ? high : low) = middle;
  }
  const int32_t key = static_cast<int32_t>(high);
  int64_t above = weight_above(p, key);
  int32_t count = count_greater(p.keys, num_keys, key);
  for (int32_t page = 0; page < p.num_pages; ++page) {
    if (p.keys[page] != key || !(static_cast<double>(above) < wanted)) continue;
    above += p.weights[page];
    ++count;
  }
  return count;
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
  int32_t budget = p.row_budget;
  if (weighs_pages(p.selection)) {
    const int32_t count = count_top_p(p, num_keys);
    budget = count < budget ? count : budget;
  }
  const int32_t threshold = find_threshold(p.keys, num_keys, budget);
  const int32_t above = count_greater(p.keys, num_keys, threshold);
  const int32_t num_ties = threshold == kDead ? 0 : budget - above;
  return write_pages(p.keys, p.num_pages, threshold, num_ties, p.page_indices);
}

}  // namespace QUEST_ISA
}  // namespace quest
