// What the threads of a CTA do together.
#pragma once

#include "cuda/calls.h"
#include "cuda/values.h"

namespace quest {
namespace cuda {

// Hands out shared memory.
class SharedMemory {
 public:
  QUEST_DEVICE SharedMemory() : next_(shared_memory()) {}
  template <class T>
  QUEST_DEVICE T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(next_);
    next_ += (count * sizeof(T) + 15) / 16 * 16;
    return p;
  }

 private:
  char* next_;
};

// For the thread's oldest group of copies, of so many under way: 4 at most.
QUEST_DEVICE void wait_for_oldest(int num_stages) {
  if (num_stages == 1) {
    wait_for_copies<0>();
  } else if (num_stages == 2) {
    wait_for_copies<1>();
  } else if (num_stages == 3) {
    wait_for_copies<2>();
  } else {
    wait_for_copies<3>();
  }
}

QUEST_DEVICE int lane_index() { return thread_index() % 32; }
QUEST_DEVICE int warp_index() { return thread_index() / 32; }

// Per warp, what sum_before and the like exchange.
struct WarpValues {
  int32_t values[kWarps];
};

// The sum of x over the threads before this one; `total`: over all. shared [kWarps] may be used
// again at once.
template <class T>
QUEST_DEVICE T sum_before(T x, T* shared, T& total) {
  T sum = x;
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const T other = shuffle_up(sum, lanes);
    if (lane_index() >= lanes) sum += other;
  }
  if (lane_index() == 31) shared[warp_index()] = sum;
  sync_cta();
  T before = 0;
  total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp_index()) before += shared[w];
    total += shared[w];
  }
  sync_cta();
  return before + sum - x;
}
QUEST_DEVICE int32_t sum_before(int32_t x, WarpValues& shared, int32_t& total) {
  return sum_before(x, shared.values, total);
}

QUEST_DEVICE uint32_t largest(uint32_t x, WarpValues& shared) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x = maximum(x, shuffle_xor(x, lanes));
  if (lane_index() == 0) shared.values[warp_index()] = static_cast<int32_t>(x);
  sync_cta();
  uint32_t top = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) top = maximum(top, static_cast<uint32_t>(shared.values[w]));
  sync_cta();
  return top;
}

QUEST_DEVICE const uint8_t* mask_of(const Rows& rows, int row, int head) {
  return rows.mask.data + row / rows.q_len * rows.mask.batch_stride + head * rows.mask.head_stride +
         row % rows.q_len * rows.mask.query_stride;
}

// As it came.
QUEST_DEVICE int64_t given_len(const Rows& rows, int batch_row) {
  const int64_t index = batch_row * rows.seq_lens_stride;
  return rows.has_long_lens ? static_cast<const int64_t*>(rows.seq_lens)[index]
                            : static_cast<const int32_t*>(rows.seq_lens)[index];
}

// The positions that a row may attend end here: at least 1, at most max_seq_len. Without a mask
// query i of q_len stands at position seq_len - q_len + i and attends what is before. With one, the
// mask says so: positions at the end that it forbids are left out, no more than those. seq_len: as
// it came.
QUEST_DEVICE int row_len(const Rows& rows, int row, int64_t seq_len, WarpValues& shared) {
  seq_len = seq_len < 1 ? 1 : seq_len < rows.max_seq_len ? seq_len : rows.max_seq_len;
  const int64_t behind = rows.q_len - 1 - row % rows.q_len;
  const int64_t causal = maximum<int64_t>(seq_len - behind, 1);
  if (!rows.mask.data || behind == 0) return static_cast<int>(causal);
  const int64_t num_heads = rows.mask.head_stride ? rows.num_q_heads : 1;
  const int64_t span = seq_len - causal;
  uint32_t end = static_cast<uint32_t>(causal);
#pragma unroll 1
  for (int64_t i = thread_index(); i < span * num_heads; i += kThreads) {
    const int64_t position = causal + i % span;
    if (mask_of(rows, row, static_cast<int>(i / span))[position * rows.mask.token_stride]) {
      end = maximum(end, static_cast<uint32_t>(position + 1));
    }
  }
  return static_cast<int>(largest(end, shared));
}

QUEST_DEVICE int row_len(const Rows& rows, int row, WarpValues& shared) {
  return row_len(rows, row, given_len(rows, row / rows.q_len), shared);
}

template <class T>
QUEST_DEVICE const T* query_of(const Query& query, const Rows& rows, int row, int head) {
  return static_cast<const T*>(query.data) + row / rows.q_len * query.batch_stride +
         head * query.head_stride + row % rows.q_len * query.query_stride;
}

template <class T>
QUEST_DEVICE const T* cache_of(const Cache& cache, int batch_row, int kv_head) {
  return static_cast<const T*>(cache.data) + batch_row * cache.batch_stride +
         kv_head * cache.head_stride;
}

// Whether a query head of [first_head, first_head + num_heads) attends a position of the page; for
// the `width` lanes of a warp that ask together, `lane` being this one's place among them.
QUEST_DEVICE bool is_live(const Rows& rows, int row, int first_head, int num_heads, int64_t page,
                          int page_size, int len, int lane, int width) {
  const int64_t begin = page * page_size;
  if (!rows.mask.data) return begin < len;
  const int64_t end = minimum<int64_t>(begin + page_size, len);
  bool found = false;
  for (int h = 0; h < (rows.mask.head_stride ? num_heads : 1); ++h) {
    const uint8_t* mask = mask_of(rows, row, first_head + h);
    for (int64_t t = begin + lane; t < end; t += width) {
      found = found || mask[t * rows.mask.token_stride];
    }
  }
  const unsigned lanes = (width == 32 ? ~0u : (1u << width) - 1) << (lane_index() - lane);
  return (ballot(found) & lanes) != 0;
}

}  // namespace cuda
}  // namespace quest
