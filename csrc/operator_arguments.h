// The arguments of operators, checked. What they are on the CPU they are on every device.
#pragma once

#include "arguments.h"

namespace quest {

struct UpdateArguments {
  DType dtype;
  int64_t batch;
  int64_t num_kv_heads;
  int64_t max_seq_len;
  int64_t head_dim;
  int64_t page_size;
  Cache key_cache;
  PageSummary page_summary;
  const int64_t* positions;  // [num_positions]
  int64_t num_positions;
  int64_t position_stride;
  int64_t* num_sealed;     // [1]
  int64_t* next_position;  // [1], or nullptr: not checked
};

UpdateArguments check_update(const Tensor& key_cache, const Tensor& cache_position,
                             const Tensor& page_summary, const Tensor& num_sealed,
                             const std::optional<Tensor>& channel_scale, SummaryFormat format);

struct ScoreArguments {
  DType dtype;
  GroupReduce group_reduce;
  Tensor query_owner;  // `query` itself, or a copy of it with a contiguous last dimension
  Query query;
  PageSummary page_summary;
  int64_t batch;
  int64_t num_kv_heads;
  int64_t group_size;
  int64_t head_dim;
  int64_t num_pages;
  int64_t max_seq_len;
  Mask mask;    // [batch, num_q_heads, 1, max_seq_len]; of sketches only
  float scale;  // of query.key
};

ScoreArguments check_score(const Tensor& query, const Tensor& page_summary, const Tensor& seq_lens,
                           const std::optional<Tensor>& channel_scale, GroupReduce group_reduce,
                           SummaryFormat format, const std::optional<Tensor>& attn_mask,
                           std::optional<double> scale);

// Pages that a query chooses.
struct Choice {
  int64_t page_budget;
  int64_t page_size;
  int64_t num_sink_pages;
  int64_t num_recent_pages;
  // Of the pages in use: a row has no more pages than that, but always those that are never left
  // out and one more.
  double budget_fraction;
  // Of the softmax over the scores of the pages that are not always attended.
  double top_p;
  float log2_scale;  // from a score to a logit in units of log2; for top_p
};

// Pages that a row with `seq_len` positions attends at most.
int64_t page_budget_of(const Choice& choice, int64_t seq_len);
// What scores are multiplied with, from the factor that makes logits of them. Errors unless finite.
float log2_scale(double score_scale);
// A row that fits has every page attended.
bool fits_budget(const Choice& choice, int64_t seq_len);

struct SelectArguments {
  Choice choice;
  Tensor owner;         // `scores` itself, or a copy of it with a contiguous last dimension
  const float* scores;  // [batch, num_heads, num_pages]
  int64_t batch_stride;
  int64_t head_stride;
  int64_t batch;
  int64_t num_heads;
  int64_t num_pages;
  int64_t max_seq_len;
  Mask mask;           // [batch, num_heads * group_size, 1, max_seq_len]
  int64_t group_size;  // heads of the mask that share a choice
};

SelectArguments check_select(const Tensor& scores, const Tensor& seq_lens,
                             const std::optional<Tensor>& attn_mask, const Choice& choice);

// Of attend_pages. Returns the number of heads that share a list of pages.
int64_t check_page_indices(const Attention& a, const Tensor& page_indices);

struct SparseArguments {
  Attention attention;
  PageSummary page_summary;
  GroupReduce group_reduce;
  Choice choice;
};

SparseArguments check_sparse(const Tensor& query, const Tensor& key_cache,
                             const Tensor& value_cache, const Tensor& page_summary,
                             const Tensor& seq_lens, const std::optional<Tensor>& attn_mask,
                             const std::optional<Tensor>& channel_scale, int64_t budget,
                             int64_t num_sink_pages, int64_t num_recent_pages,
                             GroupReduce group_reduce, SummaryFormat format,
                             std::optional<double> scale, double budget_fraction, double top_p);

}  // namespace quest
