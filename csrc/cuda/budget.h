// How many pages a row selects: shares of the pages in use, and of the weights of their scores.
// Integers but for single products, so that every device gives the same pages.
#pragma once

#include "cuda/order.h"
#include "softmax_weight.h"

namespace quest {
namespace cuda {

QUEST_DEVICE int row_pages(const Selection& selection, int len) {
  const int page_size = static_cast<int>(selection.page_size);
  return (len + page_size - 1) / page_size;
}

QUEST_DEVICE int row_budget(const Selection& selection, int num_pages) {
  return static_cast<int>(page_budget_of(selection, num_pages));
}

// Then every page is attended.
QUEST_DEVICE bool row_fits(const Selection& selection, int len) {
  const int num_pages = row_pages(selection, len);
  return num_pages <= row_budget(selection, num_pages);
}

// The share that is wanted of a sum of weights: what a sum has to reach.
QUEST_DEVICE int64_t share_of(double share, int64_t total) {
  return static_cast<int64_t>(round_up(share * static_cast<double>(total)));
}

// Of a page of this order, `best` being the highest one that is a number's. NaN weighs as much.
QUEST_DEVICE int32_t weight_of(const Selection& selection, int32_t order, int32_t best) {
  if (selection.group_reduce == GroupReduce::kSoftmax) return share_weight(score_of(order));
  const bool is_best = order == best || order == kNaNOrder;
  return softmax_weight(is_best ? 0 : (score_of(best) - score_of(order)) * selection.log2_scale);
}

}  // namespace cuda
}  // namespace quest
