#include <algorithm>

#include "counters.h"
#include "cpu/ops.h"
#include "cpu/sparse_steps.h"

namespace quest {
namespace {

// Live pages of a row where all heads have the same mask; nullptr if all are live.
const uint8_t* shared_live_pages(const SparseCall& call, int64_t row, int64_t seq_len,
                                 Scratch& scratch) {
  const Mask& mask = call.a.mask;
  if (!mask.data || mask.head_stride) return nullptr;
  uint8_t* live = scratch.take<uint8_t>(ceil_div(seq_len, call.selection.page_size));
  return find_live_pages(mask, call.q_len(), row, 0, 1, call.selection.page_size, seq_len, live)
             ? nullptr
             : live;
}

// Rows that fit the budget are dense works, KV heads of the others are groups.
void plan_rows(SparseCall& call, const int64_t* lengths, Scratch& scratch) {
  const Shape& shape = call.a.shape;
  const Selection& selection = call.selection;
  const int64_t num_rows = shape.num_rows();
  call.groups = scratch.take<Group>(num_rows * shape.num_kv_heads);
  call.works = scratch.take<Work>(num_rows * shape.num_q_heads);
  const uint8_t** live = scratch.take<const uint8_t*>(num_rows);
  bool* is_dense = scratch.take<bool>(num_rows);
  for (int64_t row = 0; row < num_rows; ++row) {
    is_dense[row] = fits_budget(selection, lengths[row]);
    if (is_dense[row]) continue;
    live[row] = shared_live_pages(call, row, lengths[row], scratch);
    call.max_pages = std::max(call.max_pages, ceil_div(lengths[row], selection.page_size));
  }
  for (int64_t b = 0; b < shape.batch; ++b) {
    call.num_dense_works +=
        plan_dense_rows(call.a, b, lengths, is_dense, call.works + call.num_dense_works);
    for (int64_t kv_head = 0; kv_head < shape.num_kv_heads; ++kv_head) {
      for (int64_t row = b * shape.q_len; row < (b + 1) * shape.q_len; ++row) {
        if (is_dense[row]) continue;
        const int64_t end = lengths[row] / selection.page_size * selection.page_size;
        const LiveTokens tokens =
            find_live_tokens(call.scoring, call.a.mask, row, kv_head, end, scratch);
        call.groups[call.num_groups++] = {row, kv_head, lengths[row], live[row], tokens, nullptr};
      }
    }
  }
}

void plan_selects(SparseCall& call, Scratch& scratch) {
  const int64_t num_selects = call.num_selects();
  call.selects = scratch.take<Select>(num_selects);
  for (int64_t i = 0; i < num_selects; ++i) {
    const int64_t group = i / call.selects_per_group;
    const int64_t first_head = call.groups[group].kv_head * call.a.shape.group_size;
    call.selects[i] = {group, first_head + i % call.selects_per_group,
                       scratch.take<int32_t>(call.selection.page_budget), 0};
  }
  call.num_works = call.num_dense_works + num_selects * call.works_per_select();
}

// Of the dense rows and of all summaries.
int64_t fixed_bytes(const SparseCall& call, const int64_t* lengths) {
  int64_t bytes = 0;
  for (int64_t row = 0; row < call.a.shape.num_rows(); ++row) {
    if (!fits_budget(call.selection, lengths[row])) continue;
    bytes += call.a.shape.num_kv_heads * cache_bytes(call.a, lengths[row]);
  }
  for (int64_t i = 0; i < call.num_groups; ++i) {
    bytes += summary_bytes(call.scoring, call.groups[i].seq_len / call.selection.page_size);
  }
  return bytes;
}

void count_call(const SparseCall& call, int64_t bytes) {
  int64_t total = 0, most = 0;
  for (int64_t i = 0; i < call.num_selects(); ++i) {
    const Select& select = call.selects[i];
    const int64_t tokens = count_tokens(select.pages, select.num_pages, call.selection.page_size,
                                        call.groups[select.group].seq_len);
    bytes += cache_bytes(call.a, tokens);
    total += tokens * call.heads_per_select;
    most = std::max(most, tokens);
  }
  count(call.num_groups ? Counter::kSparseCalls : Counter::kSparseCallsCovered, 1);
  count(Counter::kSparseRows, call.num_selects() * call.heads_per_select);
  count(Counter::kTokensAttended, total);
  count_maximum(Counter::kMaxTokensAttended, most);
  count(Counter::kBytesRead, bytes);
}

}  // namespace

Tensor decode(const SparseArguments& arguments, const Tensor& seq_lens) {
  SparseCall call(arguments.attention);
  const Shape& shape = call.a.shape;
  Scratch& scratch = call_scratch();
  scratch.reset();
  int64_t* lengths = scratch.take<int64_t>(shape.num_rows());
  read_query_lens(call.a, seq_lens, lengths);
  Tensor out = new_output(call.a);

  Scoring& scoring = call.scoring;
  scoring.dtype = call.a.dtype;
  scoring.group_reduce = arguments.selection.group_reduce;
  scoring.query = call.a.query;
  scoring.q_len = shape.q_len;
  scoring.page_summary = arguments.page_summary;
  scoring.group_size = shape.group_size;
  scoring.head_dim = shape.head_dim;
  scoring.scale = call.a.scale;
  scoring.log2_scale = arguments.selection.log2_scale;
  call.selection = arguments.selection;
  call.out = {out.mutable_data_ptr(), nullptr};
  call.selects_per_group = scoring.heads_selecting();
  call.heads_per_select = shape.group_size / call.selects_per_group;
  plan_rows(call, lengths, scratch);
  plan_selects(call, scratch);
  const int64_t bytes = fixed_bytes(call, lengths);
  const int64_t budget_tokens = call.selection.page_budget * call.selection.page_size;
  run_sparse_call(call, bytes + call.num_selects() * cache_bytes(call.a, budget_tokens), scratch);
  count_call(call, bytes);
  return out;
}

Tensor sparse_decode(Tensor query, Tensor key_cache, Tensor value_cache, Tensor page_summary,
                     Tensor seq_lens, std::optional<Tensor> attn_mask, SparseSettings settings) {
  return decode(
      check_sparse(query, key_cache, value_cache, page_summary, seq_lens, attn_mask, settings),
      seq_lens);
}

}  // namespace quest
