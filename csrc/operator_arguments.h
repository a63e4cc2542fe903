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
                             SummaryFormat format);

// How pages are scored.
struct Scoring {
  DType dtype;
  GroupReduce group_reduce;
  Query query;
  int64_t q_len;
  PageSummary page_summary;
  int64_t group_size;
  int64_t head_dim;
  float scale;       // of query.key
  float log2_scale;  // from a score of a head to a logit in units of log2

  // Heads with scores of their own.
  int64_t heads_scored() const { return group_reduce == GroupReduce::kSum ? 1 : group_size; }
  // Heads with pages of their own.
  int64_t heads_selecting() const { return group_reduce == GroupReduce::kNone ? group_size : 1; }
};

struct ScoreArguments : Scoring {
  Tensor query_owner;  // `query` itself, or a copy of it with a contiguous last dimension
  int64_t batch;
  int64_t num_kv_heads;
  int64_t num_pages;
  int64_t max_seq_len;
  Mask mask;  // [batch, num_q_heads, 1, max_seq_len]; of sketches and kSoftmax only
};

ScoreArguments check_score(const Tensor& query, const Tensor& page_summary, const Tensor& seq_lens,
                           const std::optional<Tensor>& attn_mask, GroupReduce group_reduce,
                           std::optional<double> scale, SummaryFormat format);

// What scores are multiplied with, from the factor that makes logits of them. Errors unless finite.
float log2_scale(double score_scale);

struct SelectArguments {
  Selection selection;
  Tensor owner;         // `scores` itself, or a copy of it with a contiguous last dimension
  const float* scores;  // [batch, num_heads, num_pages]
  int64_t batch_stride;
  int64_t head_stride;
  int64_t batch;
  int64_t num_heads;
  int64_t num_pages;
  int64_t max_seq_len;
  Mask mask;           // [batch, num_heads * group_size, 1, max_seq_len]
  int64_t group_size;  // heads of the mask that share a selection
};

SelectArguments check_select(const Tensor& scores, const Tensor& seq_lens,
                             const std::optional<Tensor>& attn_mask, const Selection& selection);

// Of attend_pages. Returns the number of heads that share a list of pages.
int64_t check_page_indices(const Attention& a, const Tensor& page_indices);

// The settings of sparse_decode.
struct SparseSettings {
  Selection selection;  // but for log2_scale
  std::optional<double> scale;
  SummaryFormat format;
};

struct SparseArguments {
  Attention attention;
  PageSummary page_summary;
  Selection selection;
};

SparseArguments check_sparse(const Tensor& query, const Tensor& key_cache,
                             const Tensor& value_cache, const Tensor& page_summary,
                             const Tensor& seq_lens, const std::optional<Tensor>& attn_mask,
                             const SparseSettings& settings);

}  // namespace quest
