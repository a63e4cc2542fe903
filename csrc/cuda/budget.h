// How many pages a row selects: shares of the pages in use, and of the softmax over their scores.
// Integers but for single products, so that every device gives the same pages.
#pragma once

#include "cuda/order.h"
#include "softmax_weight.h"

namespace quest {
namespace cuda {

// Pages that a row with so many in use attends at most.
QUEST_DEVICE int row_budget(const Choice& choice, int num_pages) {
  if (choice.budget_fraction == 1) return choice.page_budget;
  const int share = static_cast<int>(round_up(choice.budget_fraction * num_pages));
  const int smallest = choice.num_sink_pages + choice.num_recent_pages + 1;
  return minimum(choice.page_budget, maximum(smallest, share));
}

// Then every page is attended.
QUEST_DEVICE bool fits_budget(const Choice& choice, int len) {
  const int num_pages = (len + choice.page_size - 1) / choice.page_size;
  return num_pages <= row_budget(choice, num_pages);
}

// The share of the softmax that is wanted of a sum of weights: what a sum has to reach.
QUEST_DEVICE int64_t share_of(double top_p, int64_t total) {
  return static_cast<int64_t>(round_up(top_p * static_cast<double>(total)));
}

// Of a page of this order, `best` being the highest one that is a number's. NaN weighs as much.
QUEST_DEVICE int32_t weight_of(int32_t order, int32_t best, float log2_scale) {
  const bool is_best = order == best || order == kNaNOrder;
  return softmax_weight(is_best ? 0 : (score_of(best) - score_of(order)) * log2_scale);
}

}  // namespace cuda
}  // namespace quest
