// What kernels are given: raw pointers, sizes and strides. Kernels know no torch.
// Strides count elements, except those of masks (bytes, which is the same for bool).
#pragma once

#include <stdint.h>

#include "settings.h"
#include "sketch_row.h"

namespace quest {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16 };

constexpr int32_t kMaxHeadDim = 256;
constexpr int32_t kMaxPageSize = 128;
// Entries behind the last token of AttendParams::tokens, all of them tokens that may be read:
// kernels work in tiles of tokens and fetch ahead.
constexpr int32_t kTokenPadding = 320;
// Splits of a token list.
constexpr int32_t kMaxSplits = 128;
// Rows of partial values are whole vectors of every instruction set.
constexpr int32_t kPartialAlignment = 32;

// Strides count elements.
struct Query {
  const void* data;  // [batch, num_q_heads, q_len, head_dim], head_dim contiguous
  int64_t batch_stride;
  int64_t head_stride;
  int64_t query_stride;
};

struct Cache {
  const void* data;  // [batch, num_kv_heads, max_seq_len, head_dim], head_dim contiguous
  int64_t batch_stride;
  int64_t head_stride;
  int64_t token_stride;
};

struct PageSummary {
  SummaryFormat format;
  int64_t element_size;
  int64_t row_bytes;
  void* data;  // [batch, num_kv_heads, num_pages, row], rows contiguous
  int64_t batch_stride;
  int64_t head_stride;
  int64_t page_stride;
};

// Strides are 0 where the mask is broadcast.
struct Mask {
  const uint8_t* data;  // [batch, num_q_heads, q_len, max_seq_len], nonzero = attend; nullptr = all
  int64_t batch_stride;
  int64_t head_stride;
  int64_t query_stride;
  int64_t token_stride;
};

// Pages [first_page, last_page) of one (batch row, KV head).
struct PageSummaryParams {
  DType dtype;  // of the keys
  SummaryFormat format;
  int32_t head_dim;
  const void* key;         // [max_seq_len, head_dim]
  int64_t key_stride;      // token to token
  void* page_summary;      // [num_pages, row]
  int64_t summary_stride;  // page to page; kSketch: bytes
  int64_t first_page;
  int64_t last_page;
};

// Scores of pages [first_page, last_page) for the query heads of one (batch row, KV head).
struct ScoreParams {
  DType dtype;
  SummaryFormat format;
  GroupReduce group_reduce;  // kSum: of the summed query (kMinMax only); else of each head
  int32_t group_size;
  int32_t head_dim;
  const void* query;         // [group_size, head_dim]
  int64_t query_stride;      // head to head
  const void* page_summary;  // [num_pages, row]
  int64_t summary_stride;    // page to page; kSketch: bytes
  // kSketch only:
  float scale;          // of query.key
  const uint8_t* live;  // [positions], 0 = does not count; nullptr = all do
  int64_t live_stride;  // head to head
  int64_t first_page;
  int64_t last_page;
  float* scores;          // kSum: [num_pages], else [group_size, num_pages]
  int64_t scores_stride;  // head to head
};

// Scores of the heads of a group to the sum of each head's softmax over the pages.
struct ShareParams {
  int32_t group_size;
  int64_t num_pages;
  const float* scores;    // [group_size, num_pages], -inf: the page does not count
  int64_t scores_stride;  // head to head
  float log2_scale;       // from a score to a logit in units of log2
  float* shares;          // [num_pages], out; -inf: the page counts for no head
};

struct SelectParams {
  const float* scores;  // [num_pages]
  const uint8_t* live;  // [num_pages], 0 = no position to attend; nullptr = every page is live
  int32_t num_pages;    // pages in use, not those of the cache
  Selection selection;
  int32_t row_budget;     // pages that this row selects at most
  int32_t* keys;          // [num_pages + kKeyPadding], scratch
  int32_t* weights;       // [num_pages], scratch; where a share of the weights decides
  int32_t* page_indices;  // [row_budget], out
};
constexpr int32_t kKeyPadding = 16;

// Attention of query heads that share one KV head over a list of its tokens, not normalised yet.
struct AttendParams {
  DType dtype;
  int32_t num_heads;
  int32_t head_dim;
  int32_t value_dim;
  const void* query;      // [num_heads, head_dim]
  int64_t query_stride;   // head to head
  const void* key;        // [max_seq_len, head_dim]
  int64_t key_stride;     // token to token
  const void* value;      // [max_seq_len, value_dim]
  int64_t value_stride;   // token to token
  const int32_t* tokens;  // [num_tokens + kTokenPadding], positions to attend
  int32_t num_tokens;
  bool is_first;          // nothing has fetched the first rows
  bool is_last;           // the tokens behind are padding, not those of the next call
  float scale_log2;       // softmax scale * log2(e)
  float* maxima;          // [num_heads], out: largest logit, in units of log2; -inf without tokens
  float* sums;            // [num_heads], out: sum of exp2(logit - maximum)
  float* values;          // [num_heads, value_dim], out: sum of exp2(logit - maximum) * value
  int64_t values_stride;  // head to head: value_dim rounded up to kPartialAlignment
};

// Merges the partial results of the splits of one token list, in ascending order.
struct CombineParams {
  DType dtype;
  int32_t num_splits;
  int32_t num_heads;
  int32_t value_dim;
  const float* maxima;    // [num_splits, num_heads]
  const float* sums;      // [num_splits, num_heads]
  const float* values;    // [num_splits, num_heads, value_dim]
  int64_t values_stride;  // head to head
  void* out;              // [num_heads, value_dim]
  float* lse;             // [num_heads], natural log; may be nullptr
};

// A few rows times rows [first_output, last_output) of a weight, and the bias.
struct LinearParams {
  DType dtype;
  int32_t num_rows;     // 1 to kMaxLinearRows
  int64_t in_features;  // a multiple of 8
  int64_t out_features;
  const void* input;      // [num_rows, in_features]
  int64_t input_stride;   // row to row
  void* factors;          // [num_rows, factor_stride * 4 bytes]: the input as it is multiplied
  int64_t factor_stride;  // in_features rounded up to kPartialAlignment
  const void* weight;     // [out_features, in_features]
  int64_t weight_stride;  // row to row
  const void* bias;       // [out_features]; may be nullptr
  void* out;              // [num_rows, out_features]
  int64_t first_output;
  int64_t last_output;
};
constexpr int32_t kMaxLinearRows = 8;
// Keys that prefill takes at a time: tiles begin at multiples of it.
constexpr int64_t kPrefillTile = 128;

// What a query may attend: positions [first, last), of which `mask` may forbid some.
struct Interval {
  int32_t first;
  int32_t last;
  const uint8_t* mask;  // [max_seq_len], 0 = forbidden; nullptr: none is
};

// Attention of neighbouring queries of the heads that share one KV head, over its cache.
struct PrefillParams {
  DType dtype;
  int32_t num_queries;
  int32_t num_heads;
  int32_t head_dim;
  int32_t value_dim;
  const void* query;  // [num_queries, num_heads, head_dim]
  int64_t query_stride;
  int64_t query_head_stride;
  const void* key;            // [max_seq_len, head_dim]
  int64_t key_stride;         // token to token
  const void* value;          // [max_seq_len, value_dim]
  int64_t value_stride;       // token to token
  const Interval* intervals;  // [num_queries, num_heads]
  int64_t interval_stride;
  int64_t interval_head_stride;
  int64_t mask_stride;  // token to token
  float scale_log2;     // softmax scale * log2(e)
  void* out;            // [num_queries, num_heads, value_dim]
  int64_t out_stride;
  int64_t out_head_stride;
  float* scratch;  // prefill_scratch(...) floats, on a cache line of its own
};

// Queries and their values, then a tile of keys and two of values, in panels of whole vectors.
constexpr int64_t prefill_scratch(int64_t num_rows, int64_t head_dim, int64_t value_dim) {
  constexpr int64_t kColumns = 64, kRows = 8;  // no level has wider panels, or takes more rows
  const int64_t head = (head_dim + kColumns - 1) / kColumns * kColumns;
  const int64_t value = (value_dim + kColumns - 1) / kColumns * kColumns;
  return (num_rows + kRows) * (head + value + 2) + kPrefillTile * (head + 2 * value);
}

// The kernels of one instruction-set level (kernels/table.cpp).
struct KernelTable {
  const char* name;
  void (*summarise_pages)(const PageSummaryParams& p);
  // Whether the stored summaries of all the pages are bitwise those of their keys.
  bool (*pages_are_current)(const PageSummaryParams& p);
  void (*score_pages)(const ScoreParams& p);
  void (*share_scores)(const ShareParams& p);
  // Returns the number of pages written to page_indices, ascending.
  int32_t (*select_pages)(const SelectParams& p);
  void (*attend)(const AttendParams& p);
  void (*combine)(const CombineParams& p);
  // Makes LinearParams::factors, which `linear` reads.
  void (*prepare_linear)(const LinearParams& p);
  void (*linear)(const LinearParams& p);
  void (*prefill)(const PrefillParams& p);
};

}  // namespace quest
