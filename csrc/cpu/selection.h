// Page scores and the selection of pages for the query heads of one KV head.
#pragma once

#include "cpu/scratch.h"
#include "operator_arguments.h"

namespace quest {

// Positions that count for the scores of a group: data [group_size, positions], 0 = does not;
// nullptr: all.
struct LiveTokens {
  const uint8_t* data;
  int64_t head_stride;
};

// Of positions below `end`; all of them where scores are not of single tokens (but for sketches).
LiveTokens find_live_tokens(const Scoring& scoring, const Mask& mask, int64_t row, int64_t kv_head,
                            int64_t end, Scratch& scratch);

// Scores of pages [first_page, last_page) of a row: scores [heads_scored, num_pages] with
// `scores_stride` from head to head.
void score_page_range(const Scoring& scoring, int64_t row, int64_t kv_head, LiveTokens live,
                      int64_t first_page, int64_t last_page, float* scores, int64_t scores_stride);

// With kSoftmax: scores [group_size, num_pages] of complete pages become shares [num_pages]. A page
// that the mask forbids a head gets the score -inf of it.
void join_scores(const Scoring& scoring, const Mask& mask, int64_t row, int64_t kv_head,
                 int64_t num_pages, float* scores, int64_t scores_stride, float* shares,
                 Scratch& scratch);

// live [num_pages]: whether heads [first_head, first_head + num_heads) of the mask attend a
// position of the page below seq_len. Returns whether all pages are live. The mask is not nullptr.
bool find_live_pages(const Mask& mask, int64_t q_len, int64_t row, int64_t first_head,
                     int64_t num_heads, int64_t page_size, int64_t seq_len, uint8_t* live);

// Chooses among the pages of a row with `seq_len` positions; live [num_pages], nullptr: all are.
// Only scores of complete pages matter. Returns the number of pages written to page_indices
// [page_budget].
int64_t choose_pages(const Selection& selection, int64_t seq_len, const float* scores,
                     const uint8_t* live, int32_t* page_indices, Scratch& scratch);

// Positions below seq_len in the pages, ascending.
int64_t count_tokens(const int32_t* page_indices, int64_t num_pages, int64_t page_size,
                     int64_t seq_len);

// Bytes of the summaries of the complete pages of one KV head.
int64_t summary_bytes(const Scoring& scoring, int64_t num_complete);

}  // namespace quest
