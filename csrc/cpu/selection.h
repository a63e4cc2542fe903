// Page scores and the choice of pages for the query heads of one KV head.
#pragma once

#include "cpu/scratch.h"
#include "operator_arguments.h"

namespace quest {

// What all rows of a call share.
struct Scoring {
  DType dtype;
  GroupReduce group_reduce;
  Query query;
  int64_t q_len;
  PageSummary page_summary;
  int64_t group_size;
  int64_t head_dim;
  float scale;  // of query.key
};

// Positions that count for the scores of a KV head: data [positions], 0 = does not; nullptr: all.
// With GroupReduce::kNone of each query head, head_stride apart.
struct LiveTokens {
  const uint8_t* data;
  int64_t head_stride;
};

// Of positions below `end`; all of them where scores are not of single tokens (but for sketches).
LiveTokens find_live_tokens(const Scoring& scoring, const Mask& mask, int64_t row, int64_t kv_head,
                            int64_t end, Scratch& scratch);

// Scores of pages [first_page, last_page) of a row: scores [num_pages], with
// GroupReduce::kNone [group_size, num_pages] with `scores_stride` from head to head.
void score_page_range(const Scoring& scoring, int64_t row, int64_t kv_head, LiveTokens live,
                      int64_t first_page, int64_t last_page, float* scores, int64_t scores_stride);

// live [num_pages]: whether heads [first_head, first_head + num_heads) of the mask attend a
// position of the page below seq_len. Returns whether all pages are live. The mask is not nullptr.
bool find_live_pages(const Mask& mask, int64_t q_len, int64_t row, int64_t first_head,
                     int64_t num_heads, int64_t page_size, int64_t seq_len, uint8_t* live);

// Chooses among the pages of a row with `seq_len` positions; live [num_pages], nullptr: all are.
// Only scores of complete pages matter. Returns the number of pages written to page_indices
// [page_budget].
int64_t choose_pages(const Choice& choice, int64_t seq_len, const float* scores,
                     const uint8_t* live, int32_t* page_indices, Scratch& scratch);

// Positions below seq_len in the pages, ascending.
int64_t count_tokens(const int32_t* page_indices, int64_t num_pages, int64_t page_size,
                     int64_t seq_len);

// Bytes of the summaries of the complete pages of one KV head.
int64_t summary_bytes(const Scoring& scoring, int64_t num_complete);

}  // namespace quest
