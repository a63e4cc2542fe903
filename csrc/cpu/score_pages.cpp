#include <algorithm>
#include <limits>

#include "cpu/ops.h"
#include "cpu/selection.h"
#include "cpu/tasks.h"

namespace quest {
namespace {

constexpr int64_t kTaskPages = 512;

}  // namespace

Tensor score_pages(Tensor query, Tensor page_summary, Tensor seq_lens,
                   std::optional<Tensor> channel_scale, int64_t page_size,
                   StringHandle group_reduce, StringHandle summary) {
  Scoring scoring;
  const SummaryKind kind = check_summary_kind(summary);
  scoring.group_reduce = check_group_reduce(group_reduce);
  scoring.dtype = check_float_dtype(query, "query");
  check_single_query(query);
  const Tensor owner = contiguous_query(query);
  QUEST_CHECK(page_summary.dim() >= 3,
              "page_summary: expected [batch, num_kv_heads, num_pages, ...], got ",
              to_string(page_summary.sizes()));
  const int64_t batch = query.size(0), num_q_heads = query.size(1), head_dim = query.size(3);
  const int64_t num_kv_heads = page_summary.size(1), num_pages = page_summary.size(2);
  QUEST_CHECK(num_kv_heads > 0 && num_q_heads > 0 && num_q_heads % num_kv_heads == 0,
              "query: expected a multiple of the ", num_kv_heads, " heads of page_summary, got ",
              num_q_heads);
  check_head_dim(head_dim, "query");
  check_page_size(page_size);
  scoring.page_summary = check_page_summary(page_summary, channel_scale, kind, query, batch,
                                            num_kv_heads, num_pages, head_dim);
  check_seq_lens(seq_lens, query, batch);
  Scratch& scratch = call_scratch();
  scratch.reset();
  int64_t* lengths = scratch.take<int64_t>(batch);
  read_seq_lens(seq_lens, batch, num_pages * page_size, lengths);

  scoring.query = query_pointers(owner);
  scoring.q_len = 1;
  scoring.group_size = num_q_heads / num_kv_heads;
  scoring.head_dim = head_dim;
  const int64_t heads_out = scoring.group_reduce == GroupReduce::kNone ? scoring.group_size : 1;
  Tensor scores =
      new_tensor(query, {batch, num_kv_heads * heads_out, num_pages}, ScalarType::Float);
  float* out = static_cast<float*>(scores.mutable_data_ptr());
  const int64_t parts = ceil_div(num_pages, kTaskPages);
  const int64_t bytes = batch * num_kv_heads * summary_bytes(scoring, num_pages);
  run_tasks(batch * num_kv_heads * parts, bytes, [&](int64_t i) {
    const int64_t head = i / parts, row = head / num_kv_heads;
    const int64_t first = i % parts * kTaskPages, last = std::min(first + kTaskPages, num_pages);
    const int64_t end = std::clamp(lengths[row] / page_size, first, last);
    float* head_scores = out + head * heads_out * num_pages;
    score_page_range(scoring, row, head % num_kv_heads, first, end, head_scores, num_pages);
    for (int64_t h = 0; h < heads_out; ++h) {
      std::fill(head_scores + h * num_pages + end, head_scores + h * num_pages + last,
                -std::numeric_limits<float>::infinity());
    }
  });
  return scores;
}

}  // namespace quest
