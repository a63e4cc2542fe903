// What the CUDA kernels are given. Lengths, positions and what is stale are read on the device, so
// that nothing of a launch depends on them.
#pragma once

#include "params.h"

namespace quest {
namespace cuda {

// A row is one query of one batch row: rows of a batch row follow each other.
struct Rows {
  const void* seq_lens;  // int32 or int64 [batch] with a stride of 0 or more
  int64_t seq_lens_stride;
  bool has_long_lens;
  int32_t batch;
  int32_t q_len;
  int32_t num_q_heads;
  int32_t num_kv_heads;
  int32_t group_size;
  int32_t head_dim;
  int32_t value_dim;
  int64_t max_seq_len;  // longer seq_lens count as this, shorter ones than 1 as 1
  Mask mask;
};

// Pages that are looked at for changes made by others.
constexpr int32_t kNumSamples = 4;

// A write to the key cache, and what has to follow it.
struct Update {
  const int64_t* positions;  // [num_positions], nullptr: there was no write
  int64_t num_positions;
  int64_t position_stride;
  int64_t* num_sealed;     // [1]
  int64_t* next_position;  // [1] or nullptr
  Cache key_cache;
  bool has_aligned_keys;  // rows of keys are whole vectors of 16 bytes
  int64_t max_seq_len;
  // [batch, num_kv_heads], out: 0, or the number of leading pages among which somebody else's write
  // was found. Sampled pages of such heads are written by the kernel that comes next.
  int32_t* stale_starts;
  char* late_rows;  // [batch, num_kv_heads, kNumSamples, row]
};

struct Summaries {
  DType dtype;  // of keys and query
  PageSummary rows;
  bool has_aligned_rows;
  int32_t page_size;
  int32_t num_pages;
  int32_t head_dim;
  int32_t batch;
  int32_t num_kv_heads;
};

// Kernel 1: brings page summaries up to date and scores pages. One CTA: a share of the pages of one
// (row, KV head); with no query, of one (batch row, KV head).
struct ScoreCall {
  Summaries summaries;
  Update update;
  Rows rows;
  GroupReduce group_reduce;
  Query query;          // data nullptr: no scores are wanted
  Selection selection;  // rows that fit the budget are not scored
  float scale;          // of query.key
  int32_t num_stages;   // steps of pages that a warp has under way
  int32_t pages_per_step;
  // One of the two, [rows, num_kv_heads, 1 with kSum or else group_size, num_pages]: scores of all
  // pages, -inf where there is none, or what pages are ordered by (order_of) of the pages in use.
  float* scores;
  int32_t* order;
  int32_t* arrivals;  // [rows * num_q_heads], out: zero; may be nullptr
  int32_t num_parts;  // of the pages of a (row, KV head)
};

// How kernel 1 is followed where nothing is attended.
struct FinishCall {
  Summaries summaries;
  Update update;
};

// Scores of the heads of a group to shares (shares.h): one CTA, one (row, KV head).
struct ShareCall {
  Rows rows;
  int32_t page_size;
  int32_t num_pages;
  const int32_t* order;  // [rows, num_kv_heads, group_size, num_pages]
  float* scores;         // [rows, num_kv_heads, num_pages], out
};

// Chooses pages: one CTA, one (row, select head).
struct SelectCall {
  Rows rows;  // num_q_heads of the mask; q_len is 1
  Selection selection;
  int32_t num_select_heads;
  int32_t num_pages;
  const float* scores;
  int64_t batch_stride;
  int64_t head_stride;
  int32_t* order;         // [batch, num_select_heads, num_pages], scratch
  int32_t* page_indices;  // [batch, num_select_heads, page_budget], out
};

enum class Attended : int32_t { kAll, kListed, kSelected };

// Kernel 2: chooses pages, attends them, merges partial results and finishes the update. A work is
// one (row, select head, tile of its query heads); one CTA: a share of the units of a work.
struct AttendCall {
  DType dtype;
  Attended attended;
  Rows rows;
  Query query;
  Cache key_cache;
  Cache value_cache;
  bool has_aligned_caches;
  float scale_log2;  // softmax scale * log2(e)
  Selection selection;
  int32_t selects_per_group;
  int32_t heads_per_select;
  int32_t heads_per_tile;
  int32_t tiles_per_select;
  int32_t num_splits;  // CTAs of a work
  int32_t max_units;   // of a work
  int32_t num_stages;  // tiles that a warp has under way
  // kSelected: [rows, num_kv_heads * selects_per_group, num_pages]; with kSoftmax of each query
  // head.
  const int32_t* order;
  int32_t num_pages;
  int32_t*
      shared_order;  // kSoftmax: [rows, num_kv_heads, num_pages], scratch of long rows, or nullptr
  const int32_t* page_indices;  // kListed: [batch, num_kv_heads * selects_per_group, num_slots]
  int64_t indices_strides[3];
  int32_t num_slots;
  int32_t* lists;     // [works, max(page_budget, num_slots)], scratch of long lists, or nullptr
  void* out;          // [rows, num_q_heads, value_dim]
  float* lse;         // [rows, num_q_heads], natural log; may be nullptr
  float* partials;    // [works, max_units, heads_per_tile, value_dim + 2], if num_splits > 1
  int32_t* arrivals;  // [works], zero before and after, if num_splits > 1
  FinishCall finish;  // update.positions nullptr: nothing to finish
  bool is_next;       // behind kernel 1, which lets this one begin early
};

// Lists up to this long stay in shared memory.
constexpr int32_t kMaxSharedList = 2048;
// So do the orders of so many pages.
constexpr int32_t kMaxSharedOrder = 9216;
// Query heads of a KV head whose scores can become shares (shares.h).
constexpr int32_t kMaxSharingHeads = 128;

constexpr int32_t kThreads = 256;
constexpr int32_t kWarps = kThreads / 32;
// Tokens that a warp attends at a time.
constexpr int32_t kTileTokens = 16;
constexpr int32_t kUnitTokens = kTileTokens * kWarps;
constexpr int32_t kMaxUnits = 64;
constexpr int32_t kShortTokens = 4096;

#ifdef __CUDACC__
#define QUEST_BOTH __host__ __device__ inline
#else
#define QUEST_BOTH inline
#endif

// Tokens of a unit of a work with so many: that alone decides where sums are split, so that no bit
// depends on the number of CTAs or on the rest of the batch.
QUEST_BOTH int32_t unit_size(int64_t num_tokens) {
  if (num_tokens <= kShortTokens) return kUnitTokens;
  const int64_t size = (num_tokens + kMaxUnits - 1) / kMaxUnits;
  return static_cast<int32_t>((size + kUnitTokens - 1) / kUnitTokens * kUnitTokens);
}

// The most units of a work with up to so many tokens.
QUEST_BOTH int32_t most_units(int64_t num_tokens) {
  const int64_t units = (num_tokens + kUnitTokens - 1) / kUnitTokens;
  return static_cast<int32_t>(units < 1 ? 1 : units < kMaxUnits ? units : kMaxUnits);
}

}  // namespace cuda
}  // namespace quest
