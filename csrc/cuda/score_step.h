// What a warp scores at a time: some pages whose rows are in shared memory.
#pragma once

#include "cuda/order.h"
#include "cuda/summary_rows.h"

namespace quest {
namespace cuda {

// Scores of a page: of the summed query, or of every query head by itself.
QUEST_BOTH int num_page_scores(const ScoreCall& p) {
  return p.group_reduce == GroupReduce::kSum ? 1 : p.rows.group_size;
}

// What there is to do for a row, and a CTA's share of it.
struct PageRange {
  int first;
  int last;
  bool has_scores;   // or else pages are summarised only
  int num_complete;  // pages that get a score other than -inf
  int start;         // pages of [start, num_sealed) are summarised from their keys
  int num_sealed;
  int len;
};

// Pages [page, page + pages_per_step) of a (row, KV head).
struct Step {
  const ScoreCall& p;
  const PageRange& range;
  int64_t first_score;         // index of that of page 0
  const uint8_t* stored_mask;  // of the first head of the group; nullptr: no mask
  int page;
  const char* rows;
  int slot_bytes;    // row to row
  const char* mask;  // [pages_per_step, page_size], if all heads have the same one

  QUEST_DEVICE const char* row_at(int index) const { return rows + index * slot_bytes; }

  // Whether one of the heads [first_head, first_head + num_heads) of the group
  // attends a position of the page.
  QUEST_DEVICE bool is_live(int index, int first_head, int num_heads) const {
    const int count = num_positions(index);
    if (!stored_mask) return count > 0;
    bool found = false;
    if (!p.rows.mask.head_stride) {
      const char* live = mask + index * p.summaries.page_size;
#pragma unroll 1
      for (int i = 0; i < count; i += 8) {
        const HalfVector x = *reinterpret_cast<const HalfVector*>(live + i);
        const uint64_t bytes = x.words[0] | static_cast<uint64_t>(x.words[1]) << 32;
        found = found || (count - i < 8 ? bytes << 8 * (8 - (count - i)) : bytes) != 0;
      }
      return found;
    }
#pragma unroll 1
    for (int h = 0; h < num_heads; ++h) {
      const uint8_t* live = mask_of_head(first_head + h, index);
#pragma unroll 1
      for (int i = 0; i < count; ++i) found = found || live[i * p.rows.mask.token_stride];
    }
    return found;
  }

  // The same of 4 tokens of the page, from `first` on, as bits.
  QUEST_DEVICE unsigned live_tokens(int index, int first, int head) const {
    const int count = num_positions(index);
    const bool is_own = p.rows.mask.head_stride != 0;
    const int64_t stride = is_own ? p.rows.mask.token_stride : 1;
    const uint8_t* bytes =
        is_own ? mask_of_head(head, index)
               : reinterpret_cast<const uint8_t*>(mask) + index * p.summaries.page_size;
    unsigned live = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = first + i;
      const bool is_live = token < count && (!stored_mask || bytes[token * stride]);
      live |= static_cast<unsigned>(is_live) << i;
    }
    return live;
  }

  // A score of a page: of num_page_scores().
  QUEST_DEVICE void write(int index, int which, float score) const {
    const int at = page + index;
    if (index >= p.pages_per_step || at >= range.last) return;
    if (at >= range.num_complete) score = -kInfinity;
    const int64_t place = first_score + static_cast<int64_t>(which) * p.summaries.num_pages + at;
    if (p.scores) p.scores[place] = score;
    if (p.order) {
      p.order[place] = order_of(
          score,
          is_live(index, which, p.group_reduce == GroupReduce::kSum ? p.rows.group_size : 1));
    }
  }

 private:
  QUEST_DEVICE int num_positions(int index) const {
    const int page_size = p.summaries.page_size;
    return minimum(page_size, range.len - (page + index) * page_size);
  }
  QUEST_DEVICE const uint8_t* mask_of_head(int head, int index) const {
    return stored_mask + head * p.rows.mask.head_stride +
           static_cast<int64_t>(page + index) * p.summaries.page_size * p.rows.mask.token_stride;
  }
};

}  // namespace cuda
}  // namespace quest
