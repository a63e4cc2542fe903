// Scores of query heads that share a KV head to shares: of each head a softmax over the complete
// pages that count for it, summed over the heads. By a whole CTA; thread i has every page that is i
// more than a multiple of kThreads, so sums have the same order everywhere.
#pragma once

#include "cuda/order.h"
#include "numbers.h"

namespace quest {
namespace cuda {

// Of a head, what each warp found: the highest order of a number, and the sum of the weights.
struct HeadSums {
  int32_t best[kWarps];
  float sums[kWarps];
};
static_assert(kMaxSharingHeads * sizeof(HeadSums) <= kMaxSharedList * sizeof(int32_t),
              "they lie in the list");

class GroupShares {
 public:
  // order: of each head, `stride` apart; kDeadOrder: the head attends nothing of the page.
  QUEST_DEVICE GroupShares(const int32_t* order, int64_t stride, int num_heads, int num_complete,
                           HeadSums* heads)
      : order_(order),
        stride_(stride),
        num_heads_(num_heads),
        num_complete_(num_complete),
        heads_(heads) {}

  // To `shares`, of num_pages pages: bits of floats, -inf where a page counts for no head, or
  // kDeadOrder. They may take the place of the orders of the first head.
  QUEST_DEVICE void find(int num_pages, int32_t* shares) const {
    find_best();
    sync_cta();
    find_sums();
    sync_cta();
#pragma unroll 1
    for (int head = 0; head < num_heads_; ++head) {
      const int32_t best = best_of(head);
      float sum = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += heads_[head].sums[w];
      const float inverse = divide(1.0f, sum);
#pragma unroll 2
      for (int page = thread_index(); page < num_pages; page += kThreads) {
        const int32_t order = order_at(head, page);
        int32_t share = head == 0 ? kDeadOrder : shares[page];
        if (order != kDeadOrder && share == kDeadOrder) share = bits_of_share(-kInfinity);
        if (order > kMinusInfinityOrder && page < num_complete_) {
          // NaN stays.
          const float mine =
              order == kNaNOrder ? score_of(order) : multiply(weight_of(order, best), inverse);
          const float before = as_float(static_cast<uint32_t>(share));
          share = bits_of_share(before == -kInfinity ? mine : before + mine);
        }
        shares[page] = share;
      }
    }
  }

 private:
  QUEST_DEVICE int32_t order_at(int head, int page) const { return order_[head * stride_ + page]; }
  QUEST_DEVICE static int32_t bits_of_share(float share) {
    return static_cast<int32_t>(as_bits(share));
  }
  QUEST_DEVICE static float weight_of(int32_t order, int32_t best) {
    if (order == best) return 1;
    return power_of_2(multiply(score_of(order) - score_of(best), kLog2e<float>));
  }
  QUEST_DEVICE int32_t best_of(int head) const {
    int32_t best = kMinusInfinityOrder;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) best = maximum(best, heads_[head].best[w]);
    return best;
  }

  QUEST_DEVICE void find_best() const {
#pragma unroll 1
    for (int head = 0; head < num_heads_; ++head) {
      int32_t best = kMinusInfinityOrder;
#pragma unroll 4
      for (int page = thread_index(); page < num_complete_; page += kThreads) {
        const int32_t order = order_at(head, page);
        if (order != kNaNOrder) best = maximum(best, order);
      }
#pragma unroll
      for (int lanes = 16; lanes > 0; lanes /= 2) best = maximum(best, shuffle_xor(best, lanes));
      if (lane_index() == 0) heads_[head].best[warp_index()] = best;
    }
  }

  QUEST_DEVICE void find_sums() const {
#pragma unroll 1
    for (int head = 0; head < num_heads_; ++head) {
      const int32_t best = best_of(head);
      float sum = 0;
#pragma unroll 4
      for (int page = thread_index(); page < num_complete_; page += kThreads) {
        const int32_t order = order_at(head, page);
        if (order > kMinusInfinityOrder && order != kNaNOrder) sum += weight_of(order, best);
      }
      sum = sum_of_warp(sum, 32);
      if (lane_index() == 0) heads_[head].sums[warp_index()] = sum;
    }
  }

  const int32_t* order_;
  int64_t stride_;
  int num_heads_;
  int num_complete_;
  HeadSums* heads_;
};

// What pages are ordered by, from what GroupShares finds.
QUEST_DEVICE int32_t order_of_share(int32_t share) {
  return share == kDeadOrder ? share : order_of(as_float(static_cast<uint32_t>(share)), true);
}

}  // namespace cuda
}  // namespace quest
