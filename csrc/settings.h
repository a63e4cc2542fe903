// The settings of operators, as they travel to kernels.
#pragma once

#include <stdint.h>

#include "everywhere.h"

namespace quest {

// How the scores of query heads that share a KV head become those that pages are chosen by: as the
// score of the summed query, as the sum of each head's softmax over the pages, or not at all.
enum class GroupReduce : int32_t { kSum, kSoftmax, kNone };

// What is kept of the keys of a page, one row:
// kMinMax: minimum and maximum [2, head_dim], in the dtype of the keys.
// kSketch: sketch_row.h.
enum class SummaryKind : int32_t { kMinMax, kSketch };

// What the kinds differ in beside their rows. No default: the compiler names what a new kind lacks.

// A score is made of single tokens, by the mask and as a logit; else it bounds those of the page.
QUEST_EVERYWHERE constexpr bool scores_tokens(SummaryKind kind) {
  switch (kind) {
    case SummaryKind::kMinMax:
      return false;
    case SummaryKind::kSketch:
      return true;
  }
  return false;
}

// The score of the summed queries of a group stands for the group.
QUEST_EVERYWHERE constexpr bool takes_sum(SummaryKind kind) {
  switch (kind) {
    case SummaryKind::kMinMax:
      return true;
    case SummaryKind::kSketch:
      return false;
  }
  return false;
}

// Bytes of an element of a row.
QUEST_EVERYWHERE constexpr int64_t row_element_size(SummaryKind kind, int64_t key_element_size) {
  switch (kind) {
    case SummaryKind::kMinMax:
      return key_element_size;
    case SummaryKind::kSketch:
      return 1;
  }
  return 1;
}

struct SummaryFormat {
  int64_t page_size;
  SummaryKind kind;
  int64_t sketch_bits;  // 1 or 2; kSketch only
};

// Which pages a query attends.
struct Selection {
  int64_t page_budget;
  int64_t num_sink_pages;
  int64_t num_recent_pages;
  GroupReduce group_reduce;
  // Of the pages in use: a row has no more pages than that, but always those that are never left
  // out and one more.
  double budget_fraction;
  // Of the weights of the pages that are not always attended: their scores with kSoftmax, else a
  // softmax over those.
  double top_p;
  float log2_scale;  // from a score (kSoftmax: of a head) to a logit in units of log2
  int64_t page_size;
};

// Does a share of the weights of the pages decide, too?
QUEST_EVERYWHERE bool weighs_pages(const Selection& s) { return s.top_p < 1; }

// Pages that a row with so many in use attends at most.
QUEST_EVERYWHERE int64_t page_budget_of(const Selection& s, int64_t num_pages) {
  const double wanted = s.budget_fraction * static_cast<double>(num_pages);
  int64_t share = static_cast<int64_t>(wanted);
  share += static_cast<double>(share) < wanted;
  const int64_t smallest = s.num_sink_pages + s.num_recent_pages + 1;
  share = share < smallest ? smallest : share;
  return s.page_budget < share ? s.page_budget : share;
}

// A row that fits has every page attended.
QUEST_EVERYWHERE bool fits_budget(const Selection& s, int64_t seq_len) {
  const int64_t num_pages = (seq_len + s.page_size - 1) / s.page_size;
  return num_pages <= page_budget_of(s, num_pages);
}

}  // namespace quest
