// The steps of sparse_decode - score, select, attend - and how they are shared out to threads.
#pragma once

#include <utility>

#include "cpu/attention.h"
#include "cpu/selection.h"

namespace quest {

// A KV head of a row that exceeds the budget.
struct Group {
  int64_t row;
  int64_t kv_head;
  int64_t seq_len;
  const uint8_t* live;  // [pages in use], nullptr: all live, or every head has its own mask
  LiveTokens tokens;    // for sketches
  float* scores;        // [heads_scored, max_pages], scratch
};

// A selection of pages: of a whole group, or with group_reduce "none" of one query head.
struct Select {
  int64_t group;
  int64_t first_head;
  int32_t* pages;  // [page_budget]
  int64_t num_pages;
};

struct SparseCall {
  explicit SparseCall(Attention attention) : a(std::move(attention)) {}

  const Attention a;
  Scoring scoring{};
  Selection selection{};
  Output out{};
  int64_t selects_per_group = 0;
  int64_t heads_per_select = 0;
  int64_t max_pages = 0;  // of a sparse row
  Group* groups = nullptr;
  int64_t num_groups = 0;
  Select* selects = nullptr;  // [num_groups * selects_per_group]
  // Dense works, then those of the selects, which exist once their select is done.
  Work* works = nullptr;
  int64_t num_dense_works = 0;
  int64_t num_works = 0;

  int64_t q_len() const { return a.shape.q_len; }
  int64_t num_selects() const { return num_groups * selects_per_group; }
  int64_t works_per_select() const {
    return heads_per_select / heads_per_unit(a, heads_per_select);
  }
};

// In one parallel region. `bytes`: about what is read.
void run_sparse_call(SparseCall& call, int64_t bytes, Scratch& scratch);

}  // namespace quest
