// What select_pages orders pages by: integers in the order of the scores, NaN above all, a page
// with no position to attend below all.
#pragma once

#include "cuda/cta.h"

namespace quest {
namespace cuda {

constexpr int32_t kNaNOrder = 0x7ffffffe;
constexpr int32_t kMinusInfinityOrder = -0x7f800001;
constexpr int32_t kDeadOrder = -0x7fffffff - 1;

QUEST_DEVICE int32_t order_of(float score, bool is_live) {
  if (!is_live) return kDeadOrder;
  if (score != score) return kNaNOrder;
  return flip_negative<float>(static_cast<int32_t>(as_bits(score + 0.0f)));  // -0 and +0 are equal
}

// The number that has this order.
QUEST_DEVICE float score_of(int32_t order) {
  return as_float(static_cast<uint32_t>(flip_negative<float>(order)));
}

// Orders of pages [first, last) from their scores, both by page, for query heads
// [first_head, first_head + num_heads) that share a selection; by a whole CTA.
QUEST_DEVICE void order_pages(const Rows& rows, int row, int first_head, int num_heads,
                              int page_size, int len, int64_t first, int64_t last,
                              const float* scores, int32_t* order) {
  constexpr int kLanes = 8;
  const int lane = lane_index() % kLanes;
#pragma unroll 1
  for (; first < last; first += kThreads / kLanes) {
    const int64_t page = first + thread_index() / kLanes;
    const bool live = is_live(rows, row, first_head, num_heads, page, page_size, len, lane, kLanes);
    if (page < last && lane == 0) order[page] = order_of(scores[page], live);
  }
}

}  // namespace cuda
}  // namespace quest
