#include <algorithm>
#include <cstring>

#include "counters.h"
#include "cpu/attention.h"
#include "cpu/dispatch.h"
#include "cpu/ops.h"
#include "numbers.h"

namespace quest {
namespace {

// Rows (queries of heads) of a task: so many that packing a tile of keys is little beside them.
constexpr int64_t kTaskRows = 512;
constexpr int64_t kMinQueries = 32;
// So that threads end together.
constexpr int64_t kTasksPerThread = 4;

int64_t queries_per_task(const Shape& s) {
  const int64_t most = std::max(kMinQueries, kTaskRows / s.group_size);
  const int64_t aim = kTasksPerThread * static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t each = s.batch * s.num_kv_heads * s.q_len / aim;
  return std::min(most, std::max(kMinQueries, each / kMinQueries * kMinQueries));
}

// positions [q_len]. Errors unless they are in the cache.
void read_positions(const Tensor& cache_position, const Shape& shape, int64_t* positions) {
  const ScalarType dtype = cache_position.scalar_type();
  QUEST_CHECK(dtype == ScalarType::Int || dtype == ScalarType::Long,
              "cache_position: expected dtype int32 or int64, got ", dtype_name(dtype));
  CHECK_SHAPE(cache_position, shape.q_len);
  const void* data = cache_position.const_data_ptr();
  const int64_t stride = cache_position.stride(0);
  for (int64_t i = 0; i < shape.q_len; ++i) {
    const int64_t at = dtype == ScalarType::Long ? static_cast<const int64_t*>(data)[i * stride]
                                                 : static_cast<const int32_t*>(data)[i * stride];
    QUEST_CHECK(at >= 0 && at < shape.max_seq_len, "cache_position: expected values from 0 to ",
                shape.max_seq_len - 1, ", got ", at);
    positions[i] = at;
  }
}

// Of [0, end): from the first to the last position that the mask allows.
Interval find_interval(const uint8_t* mask, int64_t stride, int64_t end) {
  constexpr uint64_t kAllTrue = 0x0101010101010101;
  const auto eight_are = [&](int64_t at, uint64_t what) {
    uint64_t eight;
    std::memcpy(&eight, mask + at, sizeof(eight));
    return eight == what;
  };
  if (stride == 0) return {0, static_cast<int32_t>(mask[0] ? end : 0), nullptr};
  int64_t first = 0, last = end;
  if (stride == 1) {
    while (first + 8 <= end && eight_are(first, 0)) first += 8;
    while (last - 8 >= first && eight_are(last - 8, 0)) last -= 8;
  }
  while (first < last && !mask[first * stride]) ++first;
  while (first < last && !mask[(last - 1) * stride]) --last;
  int64_t at = first;
  if (stride == 1) {
    while (at + 8 <= last && eight_are(at, kAllTrue)) at += 8;
  }
  while (at < last && mask[at * stride]) ++at;
  return {static_cast<int32_t>(first), static_cast<int32_t>(last), at < last ? mask : nullptr};
}

// What every query may attend, [batch or 1, num_q_heads or 1, q_len].
struct Intervals {
  Interval* data;
  int64_t batch_stride;
  int64_t head_stride;
};

Intervals find_intervals(const Attention& a, const int64_t* positions, Scratch& scratch) {
  const Shape& s = a.shape;
  const int64_t batch = a.mask.batch_stride ? s.batch : 1;
  const int64_t num_heads = a.mask.head_stride ? s.num_q_heads : 1;
  const int64_t count = batch * num_heads * s.q_len;
  Interval* data = scratch.take<Interval>(count);
  constexpr int64_t kQueries = 64;
  const int64_t bytes = a.mask.data ? count * s.max_seq_len : 0;
  run_tasks(ceil_div(count, kQueries), bytes, [&](int64_t task) {
    for (int64_t n = task * kQueries; n < std::min(count, (task + 1) * kQueries); ++n) {
      const int64_t i = n % s.q_len, b = n / s.q_len / num_heads, h = n / s.q_len % num_heads;
      const int64_t end = positions[i] + 1;
      data[n] = a.mask.data ? find_interval(mask_of(a.mask, s.q_len, b * s.q_len + i, h),
                                            a.mask.token_stride, end)
                            : Interval{0, static_cast<int32_t>(end), nullptr};
    }
  });
  return {data, batch > 1 ? num_heads * s.q_len : 0, num_heads > 1 ? s.q_len : 0};
}

}  // namespace

Tensor dense_prefill(Tensor query, Tensor key_cache, Tensor value_cache, Tensor cache_position,
                     std::optional<Tensor> attn_mask, std::optional<double> scale) {
  const Attention a = check_attention(query, key_cache, value_cache, attn_mask, scale);
  const Shape& s = a.shape;
  CHECK_SAME_DEVICE(cache_position, query);
  Scratch& scratch = call_scratch();
  scratch.reset();
  int64_t* positions = scratch.take<int64_t>(s.q_len);
  read_positions(cache_position, s, positions);
  const Intervals intervals = find_intervals(a, positions, scratch);
  Tensor out = new_output(a);
  void* const out_data = out.mutable_data_ptr();

  const int64_t size = queries_per_task(s), num_blocks = ceil_div(s.q_len, size);
  const int64_t num_heads = s.batch * s.num_kv_heads;
  run_tasks(num_blocks * num_heads, kSerialBytes, [&](int64_t task) {
    // The last ones attend most.
    const int64_t first = (num_blocks - 1 - task / num_heads) * size;
    const int64_t b = task % num_heads / s.num_kv_heads, kv_head = task % s.num_kv_heads;
    const int64_t row = b * s.q_len + first, head = kv_head * s.group_size;
    PrefillParams p;
    p.dtype = a.dtype;
    p.num_queries = static_cast<int32_t>(std::min(size, s.q_len - first));
    p.num_heads = static_cast<int32_t>(s.group_size);
    p.head_dim = static_cast<int32_t>(s.head_dim);
    p.value_dim = static_cast<int32_t>(s.value_dim);
    p.query = query_of(a.query, a.dtype, s.q_len, row, head);
    p.query_stride = a.query.query_stride;
    p.query_head_stride = a.query.head_stride;
    p.key = cache_of(a.key_cache, a.dtype, b, kv_head);
    p.key_stride = a.key_cache.token_stride;
    p.value = cache_of(a.value_cache, a.dtype, b, kv_head);
    p.value_stride = a.value_cache.token_stride;
    p.intervals =
        intervals.data + b * intervals.batch_stride + head * intervals.head_stride + first;
    p.interval_stride = 1;
    p.interval_head_stride = intervals.head_stride;
    p.mask_stride = a.mask.token_stride;
    p.scale_log2 = a.scale * kLog2e<float>;
    p.out = offset(out_data, a.dtype, (row * s.num_q_heads + head) * s.value_dim);
    p.out_stride = s.num_q_heads * s.value_dim;
    p.out_head_stride = s.value_dim;
    Scratch& mine = task_scratch();
    mine.reset();
    const int64_t num_rows = static_cast<int64_t>(p.num_queries) * p.num_heads;
    p.scratch = mine.take<float>(prefill_scratch(num_rows, s.head_dim, s.value_dim));
    kernels().prefill(p);
  });
  count(Counter::kPrefillCalls, 1);
  return out;
}

}  // namespace quest
