// Attention of single queries over chosen tokens, split along the sequence. A row is one query of
// one batch row.
//
// The boundaries of the splits depend on the row alone, never on threads or on the rest of the
// batch, and partial results are merged in order: so do the bits.
#pragma once

#include "arguments.h"
#include "cpu/scratch.h"
#include "cpu/tasks.h"

namespace quest {

// Query heads of a row that attend the same tokens of one KV head.
struct Unit {
  int64_t row;
  int64_t first_head;
  int64_t num_heads;
  int64_t kv_head;
};

// Units of the heads [first, first + count) of a row, all of one KV head: one, or with a mask of
// its own for every head one per head.
int64_t heads_per_unit(const Attention& a, int64_t count);
Unit make_unit(const Attention& a, int64_t row, int64_t first_head, int64_t num_heads);

// Partial results of the splits of a unit.
struct Partials {
  float* maxima;  // [num_splits, num_heads]
  float* sums;    // [num_splits, num_heads]
  float* values;  // [num_splits, num_heads, value_dim rounded up]
};

struct Work {
  Unit unit;
  int64_t seq_len;
  const int32_t* pages;  // [num_pages] to attend; nullptr: every position below seq_len
  int64_t num_pages;
  int64_t page_size;
  int64_t split_size;  // positions of a split, or pages
  int64_t num_splits;
  Partials partials;
};

Work plan_dense(const Unit& unit, int64_t seq_len);
// Dense works of the rows of a batch row (lengths [num_rows]) that are dense (is_dense [num_rows];
// nullptr: all), written to `works`; returns how many. Queries that attend the same tokens follow
// each other.
int64_t plan_dense_rows(const Attention& a, int64_t batch_row, const int64_t* lengths,
                        const bool* is_dense, Work* works);
// How many works from `first` on differ in the query alone.
int64_t count_queries(const Attention& a, const Work* works, int64_t first, int64_t num_works);
Work plan_pages(const Unit& unit, int64_t seq_len, const int32_t* pages, int64_t num_pages,
                int64_t page_size);
// The most splits that plan_pages can make of num_pages pages or fewer.
int64_t max_page_splits(int64_t num_pages, int64_t page_size);
void take_partials(const Attention& a, Work& work, int64_t num_splits, Scratch& scratch);

// data: [batch, q_len, num_q_heads, value_dim] (new_output); lse: [batch, num_q_heads, 1] (q_len is
// 1) or nullptr.
struct Output {
  void* data;
  float* lse;
};

// One split, and what is left when all are done.
void attend_split(const Attention& a, const Work& work, int64_t split, Scratch& scratch);
void combine_splits(const Attention& a, const Work& work, const Output& out);
// All of a unit on this thread: the same bits.
void attend_unit(const Attention& a, Work& work, const Output& out, Scratch& scratch);

// Every unit, its splits shared out to torch's threads.
void attend_all(const Attention& a, Work* works, int64_t num_works, const Output& out,
                Scratch& scratch);

// Bytes of keys and values of `num_tokens` tokens of one KV head.
int64_t cache_bytes(const Attention& a, int64_t num_tokens);

}  // namespace quest
