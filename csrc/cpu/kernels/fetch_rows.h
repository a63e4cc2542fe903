// Where the rows of a token list are, and fetching them ahead of their use: row by row and evenly,
// as a CPU drops fetches that come faster than memory can give.
#pragma once

#include "cpu/kernels/vec.h"
#include "params.h"

namespace quest {
namespace QUEST_ISA {

constexpr int kSpan = 256;
// Rows are fetched so many bytes before they are used.
constexpr int kFetchBytes = 16384;
constexpr int kMaxFetchTokens = 128;
// Tokens whose values are added between two fetches.
constexpr int kFetchStep = 8;
// A fetch that misses the TLB stalls until the address is known: a few at once take no longer, so
// a row of every few tokens is touched that much ahead of the fetches.
constexpr int kTouchTokens = 64;
constexpr int kTouchStep = 16;
constexpr int kMemoryPage = 4096;

// A part of AttendParams::tokens, at most kSpan.
struct Span {
  const int32_t* tokens;
  int size;
  bool is_fetched;  // into the L2 cache, by another tile of heads
  bool is_last;
};

template <class T>
struct Rows {
  const T* data;
  int64_t stride;
  int bytes;

  QUEST_INLINE const T* operator[](int32_t token) const { return data + token * stride; }
};

template <class T>
Rows<T> keys_of(const AttendParams& p) {
  return {static_cast<const T*>(p.key), p.key_stride, p.head_dim * static_cast<int>(sizeof(T))};
}

template <class T>
Rows<T> values_of(const AttendParams& p) {
  return {static_cast<const T*>(p.value), p.value_stride,
          p.value_dim * static_cast<int>(sizeof(T))};
}

// Where the rows of a pass over a span are, followed by those of the pass behind it. Found once for
// all columns and heads: otherwise addresses cost as much as the arithmetic on short vectors.
template <class T>
class Pass {
 public:
  // next_tokens nullptr: nothing follows.
  void find(const Span& span, const Rows<T>& rows, const Rows<T>& next_rows,
            const int32_t* next_tokens) {
    bytes_ = rows.bytes;
    const int wanted = kFetchBytes / bytes_;
    ahead_ = wanted < kMaxFetchTokens ? wanted : kMaxFetchTokens;
    const int tokens = kMemoryPage / bytes_;
    touch_step_ = tokens < kTouchStep ? tokens : kTouchStep;
    const int size = span.size;
    for (int i = 0; i < size; ++i) rows_[i] = rows[span.tokens[i]];
    for (int i = 0; i < kMaxAhead; ++i) {
      rows_[size + i] = next_tokens ? next_rows[next_tokens[i]] : rows_[size - 1];
    }
  }

  QUEST_INLINE const T* operator[](int t) const { return rows_[t]; }

  // When row t is used: the row that comes ahead_ rows later.
  QUEST_INLINE void fetch(int t) const {
    if (t % kTouchTokens == 0) touch(t + ahead_ + kTouchTokens, kTouchTokens);
    prefetch(rows_[t + ahead_], bytes_);
  }

  // The first rows, which no pass before has fetched.
  void begin() const {
    touch(0, ahead_ + kTouchTokens);
    for (int i = 0; i < ahead_; ++i) prefetch(rows_[i], bytes_);
  }

 private:
  void touch(int first, int count) const {
    for (int i = first; i < first + count; i += touch_step_) {
      prefetch(rows_[i], 1);
      // Rows need not begin where memory pages do.
      prefetch(reinterpret_cast<const char*>(rows_[i + touch_step_ - 1]) + bytes_ - 1, 1);
    }
  }

  static constexpr int kMaxAhead = kMaxFetchTokens + 2 * kTouchTokens;
  static_assert(kMaxAhead <= kTokenPadding, "what is fetched ahead are tokens that may be read");
  const T* rows_[kSpan + kMaxAhead];
  int bytes_, ahead_, touch_step_;
};

template <class T>
struct Passes {
  Pass<T> keys, values;

  void find(const AttendParams& p, const Span& span) {
    const Rows<T> keys_rows = keys_of<T>(p), values_rows = values_of<T>(p);
    keys.find(span, keys_rows, values_rows, span.tokens);
    values.find(span, values_rows, keys_rows, span.is_last ? nullptr : span.tokens + span.size);
  }
};

// Spreads the fetches for a span evenly over all passes over its columns.
template <class T>
class Fetches {
 public:
  Fetches(const Span& span, const Pass<T>& values, int num_passes)
      : values_(values), size_(span.is_fetched ? 0 : span.size), num_passes_(num_passes) {}

  // Before kFetchStep tokens of one pass.
  QUEST_INLINE void advance() {
    if (row_ == size_) return;
    for (steps_ += kFetchStep; steps_ >= num_passes_ && row_ < size_; steps_ -= num_passes_) {
      values_.fetch(row_++);
    }
  }

 private:
  const Pass<T>& values_;
  int size_, num_passes_;
  int row_ = 0, steps_ = 0;
};

}  // namespace QUEST_ISA
}  // namespace quest
