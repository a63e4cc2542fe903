#include "cpu/attention.h"

#include <algorithm>
#include <cstring>

#include "cpu/dispatch.h"
#include "numbers.h"

namespace quest {
namespace {

constexpr int64_t kSmallSplit = 512;
constexpr int64_t kLargeSplit = 2048;
constexpr int64_t kAimedSplits = 64;

// Tokens of a split: small enough that a few thousand tokens of 8 KV heads keep many threads busy,
// large enough that merging is nothing beside reading.
int64_t split_tokens(int64_t num_tokens) {
  if (num_tokens <= 2 * kLargeSplit) return kSmallSplit;
  return std::max(kLargeSplit,
                  ceil_div(ceil_div(num_tokens, kAimedSplits), kSmallSplit) * kSmallSplit);
}

// page_size is at most 128.
int64_t split_pages(int64_t num_pages, int64_t page_size) {
  return split_tokens(num_pages * page_size) / page_size;
}

int64_t partial_stride(const Attention& a) {
  return ceil_div(a.shape.value_dim, kPartialAlignment) * kPartialAlignment;
}

int32_t* append_range(int64_t begin, int64_t end, int32_t* tokens) {
  for (int64_t t = begin; t < end; ++t) *tokens++ = static_cast<int32_t>(t);
  return tokens;
}

// Positions [begin, end) that the mask lets the unit attend.
int32_t* append_positions(const Attention& a, const Unit& unit, int64_t begin, int64_t end,
                          int32_t* tokens) {
  if (!a.mask.data) return append_range(begin, end, tokens);
  const uint8_t* mask = mask_of(a.mask, a.shape.q_len, unit.row, unit.first_head);
  while (begin < end) {
    const int64_t next = std::min(begin + 8, end);
    if (a.mask.token_stride == 1 && next == begin + 8) {
      constexpr uint64_t kAllTrue = 0x0101010101010101;
      uint64_t eight;
      std::memcpy(&eight, mask + begin, sizeof(eight));
      if (eight == kAllTrue) tokens = append_range(begin, next, tokens);
      if (eight == kAllTrue || eight == 0) begin = next;
    }
    for (; begin < next; ++begin) {
      *tokens = static_cast<int32_t>(begin);
      tokens += mask[begin * a.mask.token_stride] != 0;
    }
  }
  return tokens;
}

int32_t* append_split(const Attention& a, const Work& work, int64_t split, int32_t* tokens) {
  const int64_t begin = split * work.split_size;
  if (!work.pages) {
    return append_positions(a, work.unit, begin, std::min(begin + work.split_size, work.seq_len),
                            tokens);
  }
  for (int64_t i = begin; i < std::min(begin + work.split_size, work.num_pages); ++i) {
    const int64_t first = work.pages[i] * work.page_size;
    tokens = append_positions(a, work.unit, first, std::min(first + work.page_size, work.seq_len),
                              tokens);
  }
  return tokens;
}

void pad_tokens(const int32_t* tokens, int32_t* end) {
  std::fill_n(end, kTokenPadding, end > tokens ? end[-1] : 0);
}

void attend_tokens(const Attention& a, const Work& work, int64_t split, const int32_t* tokens,
                   int64_t num_tokens, bool is_first, bool is_last) {
  const Unit& unit = work.unit;
  const Shape& shape = a.shape;
  AttendParams p;
  p.dtype = a.dtype;
  p.num_heads = static_cast<int32_t>(unit.num_heads);
  p.head_dim = static_cast<int32_t>(shape.head_dim);
  p.value_dim = static_cast<int32_t>(shape.value_dim);
  const int64_t batch_row = unit.row / shape.q_len;
  p.query = query_of(a.query, a.dtype, shape.q_len, unit.row, unit.first_head);
  p.query_stride = a.query.head_stride;
  p.key = cache_of(a.key_cache, a.dtype, batch_row, unit.kv_head);
  p.key_stride = a.key_cache.token_stride;
  p.value = cache_of(a.value_cache, a.dtype, batch_row, unit.kv_head);
  p.value_stride = a.value_cache.token_stride;
  p.tokens = tokens;
  p.num_tokens = static_cast<int32_t>(num_tokens);
  p.is_first = is_first;
  p.is_last = is_last;
  p.scale_log2 = a.scale * kLog2e<float>;
  p.maxima = work.partials.maxima + split * unit.num_heads;
  p.sums = work.partials.sums + split * unit.num_heads;
  p.values_stride = partial_stride(a);
  p.values = work.partials.values + split * unit.num_heads * p.values_stride;
  kernels().attend(p);
}

}  // namespace

int64_t heads_per_unit(const Attention& a, int64_t count) { return a.mask.head_stride ? 1 : count; }

Unit make_unit(const Attention& a, int64_t row, int64_t first_head, int64_t num_heads) {
  return {row, first_head, num_heads, first_head / a.shape.group_size};
}

Work plan_dense(const Unit& unit, int64_t seq_len) {
  const int64_t size = split_tokens(seq_len);
  return {unit, seq_len, nullptr, 0, 0, size, ceil_div(seq_len, size), {}};
}

int64_t plan_dense_rows(const Attention& a, int64_t batch_row, const int64_t* lengths,
                        const bool* is_dense, Work* works) {
  const Shape& shape = a.shape;
  const int64_t num_heads = heads_per_unit(a, shape.group_size);
  int64_t count = 0;
  for (int64_t head = 0; head < shape.num_q_heads; head += num_heads) {
    for (int64_t row = batch_row * shape.q_len; row < (batch_row + 1) * shape.q_len; ++row) {
      if (is_dense && !is_dense[row]) continue;
      works[count++] = plan_dense(make_unit(a, row, head, num_heads), lengths[row]);
    }
  }
  return count;
}

int64_t count_queries(const Attention& a, const Work* works, int64_t first, int64_t num_works) {
  const Unit& unit = works[first].unit;
  int64_t end = first + 1;
  for (; end < num_works; ++end) {
    const Unit& other = works[end].unit;
    if (other.row / a.shape.q_len != unit.row / a.shape.q_len ||
        other.first_head != unit.first_head) {
      break;
    }
  }
  return end - first;
}

Work plan_pages(const Unit& unit, int64_t seq_len, const int32_t* pages, int64_t num_pages,
                int64_t page_size) {
  const int64_t size = split_pages(num_pages, page_size);
  return {unit, seq_len, pages, num_pages, page_size, size, ceil_div(num_pages, size), {}};
}

int64_t max_page_splits(int64_t num_pages, int64_t page_size) {
  // The size of a split jumps, so fewer pages may make more splits.
  const int64_t small = std::min(num_pages, 2 * kLargeSplit / page_size);
  const int64_t num_large = ceil_div(num_pages, kLargeSplit / page_size);
  return std::max(ceil_div(small, kSmallSplit / page_size),
                  std::min<int64_t>(num_large, kMaxSplits));
}

void take_partials(const Attention& a, Work& work, int64_t num_splits, Scratch& scratch) {
  const int64_t count = num_splits * work.unit.num_heads;
  work.partials = {scratch.take<float>(count), scratch.take<float>(count),
                   scratch.take<float>(count * partial_stride(a))};
}

void attend_split(const Attention& a, const Work& work, int64_t split, Scratch& scratch) {
  const int64_t capacity = work.split_size * (work.pages ? work.page_size : 1);
  int32_t* tokens = scratch.take<int32_t>(capacity + kTokenPadding);
  int32_t* end = append_split(a, work, split, tokens);
  pad_tokens(tokens, end);
  attend_tokens(a, work, split, tokens, end - tokens, true, true);
}

void combine_splits(const Attention& a, const Work& work, const Output& out) {
  const Unit& unit = work.unit;
  const int64_t head = unit.row * a.shape.num_q_heads + unit.first_head;
  CombineParams p;
  p.dtype = a.dtype;
  p.num_splits = static_cast<int32_t>(work.num_splits);
  p.num_heads = static_cast<int32_t>(unit.num_heads);
  p.value_dim = static_cast<int32_t>(a.shape.value_dim);
  p.maxima = work.partials.maxima;
  p.sums = work.partials.sums;
  p.values = work.partials.values;
  p.values_stride = partial_stride(a);
  p.out = offset(out.data, a.dtype, head * a.shape.value_dim);
  p.lse = out.lse ? out.lse + head : nullptr;
  kernels().combine(p);
}

void attend_unit(const Attention& a, Work& work, const Output& out, Scratch& scratch) {
  take_partials(a, work, work.num_splits, scratch);
  const int64_t capacity = work.num_splits * work.split_size * (work.pages ? work.page_size : 1);
  int32_t* tokens = scratch.take<int32_t>(capacity + kTokenPadding);
  // Split s is [ends[s - 1], ends[s]): while it is attended the kernel fetches rows of the next
  // one.
  int32_t* ends[kMaxSplits];
  int32_t* end = tokens;
  for (int64_t s = 0; s < work.num_splits; ++s) ends[s] = end = append_split(a, work, s, end);
  pad_tokens(tokens, end);
  const int32_t* begin = tokens;
  for (int64_t s = 0; s < work.num_splits; ++s) {
    attend_tokens(a, work, s, begin, ends[s] - begin, s == 0, s + 1 == work.num_splits);
    begin = ends[s];
  }
  combine_splits(a, work, out);
}

void attend_all(const Attention& a, Work* works, int64_t num_works, const Output& out,
                Scratch& scratch) {
  // A split of the tokens, for all queries: they are read from memory once.
  struct Task {
    int64_t first;
    int64_t num_works;
    int64_t split;
  };
  const auto num_parts = [&](int64_t i) { return std::max<int64_t>(1, works[i].num_splits); };
  int64_t max_tasks = 0, bytes = 0;
  Countdown* pending = scratch.take<Countdown>(num_works);
  for (int64_t i = 0; i < num_works; ++i) {
    Work& work = works[i];
    take_partials(a, work, work.num_splits, scratch);
    new (&pending[i]) Countdown(static_cast<int32_t>(num_parts(i)));
    max_tasks += num_parts(i);
    bytes += cache_bytes(a, work.pages ? work.num_pages * work.page_size : work.seq_len);
  }
  Task* tasks = scratch.take<Task>(max_tasks);
  int64_t num_tasks = 0;
  for (int64_t first = 0, count; first < num_works; first += count) {
    count = count_queries(a, works, first, num_works);
    int64_t parts = 0;
    for (int64_t i = first; i < first + count; ++i) parts = std::max(parts, num_parts(i));
    for (int64_t split = 0; split < parts; ++split) tasks[num_tasks++] = {first, count, split};
  }
  run_tasks(num_tasks, bytes, [&](int64_t t) {
    const Task& task = tasks[t];
    for (int64_t i = task.first; i < task.first + task.num_works; ++i) {
      if (task.split >= num_parts(i)) continue;
      Scratch& mine = task_scratch();
      mine.reset();
      if (task.split < works[i].num_splits) attend_split(a, works[i], task.split, mine);
      if (finish_one(pending[i])) combine_splits(a, works[i], out);
    }
  });
}

int64_t cache_bytes(const Attention& a, int64_t num_tokens) {
  return num_tokens * (a.shape.head_dim + a.shape.value_dim) * element_size(a.dtype);
}

}  // namespace quest
