#include "cuda/plan.h"

#include <algorithm>

#include "numbers.h"

namespace quest {
namespace cuda {
namespace {

constexpr int32_t kMaxStages = 3;
// Rows of kernel 1 that are under way: enough that no SM waits, and room for two CTAs.
constexpr int64_t kScoreBytes = 112 << 10;
constexpr int32_t kMaxScoreStages = 4;

bool is_multiple(int64_t x, int64_t unit) { return x % unit == 0; }

bool is_aligned(const Cache& cache, int64_t element_size) {
  const int64_t unit = 16 / element_size;
  return is_multiple(reinterpret_cast<intptr_t>(cache.data), 16) &&
         is_multiple(cache.batch_stride, unit) && is_multiple(cache.head_stride, unit) &&
         is_multiple(cache.token_stride, unit);
}

int64_t max_tokens(const AttendCall& call) {
  switch (call.attended) {
    case Attended::kAll:
      return call.rows.max_seq_len;
    case Attended::kListed:
      return static_cast<int64_t>(call.num_slots) * call.selection.page_size;
    default:
      return call.selection.page_budget * call.selection.page_size;
  }
}

// The number of CTAs per work with which all are done first, if a unit takes as long as what a CTA
// does before and after.
int32_t choose_splits(int64_t num_works, int32_t num_units, const Device& device) {
  int64_t best_cost = INT64_MAX;
  int32_t best = 1;
  for (int32_t splits = 1; splits <= num_units; ++splits) {
    const int64_t waves = ceil_div(num_works * splits, device.num_sms);
    const int64_t cost = waves * (ceil_div(num_units, splits) + 1) * 16 + splits;
    if (cost < best_cost) {
      best_cost = cost;
      best = splits;
    }
  }
  return best;
}

}  // namespace

void set_lens(Rows& rows, const Tensor& seq_lens) {
  rows.seq_lens = seq_lens.const_data_ptr();
  rows.seq_lens_stride = seq_lens.size(0) == 1 ? 0 : seq_lens.stride(0);
  rows.has_long_lens = seq_lens.scalar_type() == ScalarType::Long;
}

Rows make_rows(const Attention& a, const Tensor& seq_lens) {
  Rows rows = {};
  set_lens(rows, seq_lens);
  rows.batch = static_cast<int32_t>(a.shape.batch);
  rows.q_len = static_cast<int32_t>(a.shape.q_len);
  rows.num_q_heads = static_cast<int32_t>(a.shape.num_q_heads);
  rows.num_kv_heads = static_cast<int32_t>(a.shape.num_kv_heads);
  rows.group_size = static_cast<int32_t>(a.shape.group_size);
  rows.head_dim = static_cast<int32_t>(a.shape.head_dim);
  rows.value_dim = static_cast<int32_t>(a.shape.value_dim);
  rows.max_seq_len = a.shape.max_seq_len;
  rows.mask = a.mask;
  return rows;
}

Summaries make_summaries(const PageSummary& rows, DType dtype, int64_t batch, int64_t num_kv_heads,
                         int64_t num_pages, int64_t head_dim) {
  Summaries s = {};
  s.dtype = dtype;
  s.rows = rows;
  const int64_t unit = 16 / rows.element_size;
  s.has_aligned_rows = is_multiple(reinterpret_cast<intptr_t>(rows.data), 16) &&
                       is_multiple(rows.batch_stride, unit) &&
                       is_multiple(rows.head_stride, unit) && is_multiple(rows.page_stride, unit);
  s.page_size = static_cast<int32_t>(rows.format.page_size);
  s.num_pages = static_cast<int32_t>(num_pages);
  s.head_dim = static_cast<int32_t>(head_dim);
  s.batch = static_cast<int32_t>(batch);
  s.num_kv_heads = static_cast<int32_t>(num_kv_heads);
  return s;
}

float score_scale(GroupReduce group_reduce, SummaryKind kind, float scale) {
  return scores_tokens(kind) || group_reduce == GroupReduce::kSoftmax ? scale : 1;
}

Update make_update(const UpdateArguments& u) {
  Update update = {};
  update.positions = u.positions;
  update.num_positions = u.num_positions;
  update.position_stride = u.position_stride;
  update.num_sealed = u.num_sealed;
  update.next_position = u.next_position;
  update.key_cache = u.key_cache;
  update.has_aligned_keys = is_aligned(u.key_cache, element_size(u.dtype));
  update.max_seq_len = u.max_seq_len;
  return update;
}

AttendCall make_attend(const Attention& a, const Tensor& seq_lens, const Tensor& out) {
  AttendCall call = {};
  call.dtype = a.dtype;
  call.attended = Attended::kAll;
  call.rows = make_rows(a, seq_lens);
  call.query = a.query;
  call.key_cache = a.key_cache;
  call.value_cache = a.value_cache;
  const int64_t size = element_size(a.dtype);
  call.has_aligned_caches = is_aligned(a.key_cache, size) && is_aligned(a.value_cache, size);
  call.scale_log2 = a.scale * kLog2e<float>;
  call.selection.page_size = 1;
  call.selects_per_group = 1;
  call.heads_per_select = static_cast<int32_t>(a.shape.group_size);
  call.out = out.mutable_data_ptr();
  return call;
}

bool choose_stages(AttendCall& call, const Device& device,
                   const std::function<int64_t()>& shared_bytes) {
  const int64_t tiles_per_warp = ceil_div(ceil_div(max_tokens(call), call.num_splits),
                                          static_cast<int64_t>(attend_step(call)));
  call.num_stages = static_cast<int32_t>(std::clamp<int64_t>(tiles_per_warp, 1, kMaxStages));
  while (call.num_stages > 0 && shared_bytes() > device.shared_bytes) --call.num_stages;
  return call.num_stages > 0;
}

int64_t plan_attend(AttendCall& call, const Device& device) {
  const int64_t num_tokens = max_tokens(call);
  call.max_units = most_units(num_tokens);
  // Heads with masks of their own do not attend the same tokens.
  call.heads_per_tile =
      call.rows.mask.head_stride ? 1 : std::min(call.heads_per_select, max_heads(call.dtype));
  const auto shared_bytes = [&](int32_t stages) {
    call.num_stages = stages;
    return attend_bytes(call);
  };
  while (call.heads_per_tile > 1 && shared_bytes(1) > device.shared_bytes) {
    call.heads_per_tile = (call.heads_per_tile + 1) / 2;
  }
  QUEST_CHECK(shared_bytes(1) <= device.shared_bytes, "attention needs ", shared_bytes(1),
              " bytes of shared memory, the GPU has ", device.shared_bytes);
  call.tiles_per_select =
      static_cast<int32_t>(ceil_div(call.heads_per_select, call.heads_per_tile));
  const int64_t num_works = static_cast<int64_t>(call.rows.batch) * call.rows.q_len *
                            call.rows.num_kv_heads * call.selects_per_group * call.tiles_per_select;
  call.num_splits = choose_splits(num_works, call.max_units, device);
  choose_stages(call, device, [&] { return attend_bytes(call); });
  return num_works;
}

// As many pages at a time as the shared memory allows; of min/max rows, whose number is fixed, as
// many steps.
void choose_steps(ScoreCall& call, const Device& device) {
  const bool is_sketch = scores_tokens(call.summaries.rows.format.kind);
  const int64_t most = std::min(device.shared_bytes, kScoreBytes);
  call.pages_per_step = call.query.data ? pages_per_step(call.summaries) : 1;
  for (;; call.pages_per_step /= 2) {
    call.num_stages = call.query.data ? kMaxScoreStages : 1;
    while (call.num_stages > 1 && score_bytes(call) > most) --call.num_stages;
    if (call.num_stages > 1 || call.pages_per_step == 1 || !is_sketch) return;
  }
}

void plan_score(ScoreCall& call, const Device& device) {
  choose_steps(call, device);
  QUEST_CHECK(score_bytes(call) <= device.shared_bytes, "query: the weights of ",
              call.rows.group_size,
              " heads that share a KV head do not fit the shared memory of the GPU");
  QUEST_CHECK(
      call.group_reduce != GroupReduce::kSoftmax || call.rows.group_size <= kMaxSharingHeads,
      "group_reduce: 'softmax' takes up to ", kMaxSharingHeads, " heads that share a KV head, got ",
      call.rows.group_size);
  const int64_t heads =
      static_cast<int64_t>(call.rows.batch) * call.rows.q_len * call.summaries.num_kv_heads;
  // Scores of 32 pages are about the least that is worth one.
  const int64_t least = call.query.data ? 32 : 8;
  const int64_t most = std::max<int64_t>(1, ceil_div(call.summaries.num_pages, least));
  call.num_parts = static_cast<int32_t>(
      std::clamp<int64_t>(device.num_sms / std::max<int64_t>(heads, 1), 1, most));
}

void take_scratch(Update& update, const Summaries& summaries, Workspace& workspace) {
  const int64_t num_heads = static_cast<int64_t>(summaries.batch) * summaries.num_kv_heads;
  update.stale_starts = workspace.take<int32_t>(num_heads);
  update.late_rows = workspace.take<char>(num_heads * kNumSamples * summaries.rows.row_bytes);
}

void take_scratch(AttendCall& call, int64_t num_works, Workspace& workspace) {
  const int64_t list = call.attended == Attended::kAll      ? 0
                       : call.attended == Attended::kListed ? call.num_slots
                                                            : call.selection.page_budget;
  if (list > kMaxSharedList) call.lists = workspace.take<int32_t>(num_works * list);
  if (call.num_splits == 1) return;
  call.partials = workspace.take<float>(num_works * call.max_units * call.heads_per_tile *
                                        (call.rows.value_dim + 2));
  if (!call.arrivals) call.arrivals = workspace.take<int32_t>(num_works);
}

}  // namespace cuda
}  // namespace quest
