#include <algorithm>
#include <limits>

#include "cpu/ops.h"
#include "cpu/selection.h"
#include "cpu/tasks.h"

namespace quest {
namespace {

// Pages of a task: many, as each prepares the query, but four tasks for every thread.
int64_t choose_task_pages(int64_t num_heads, int64_t num_pages) {
  constexpr int64_t kFewest = 512, kMost = 4096;
  const int64_t share = num_heads * num_pages / (4 * torch::stable::get_num_threads());
  return std::clamp(share / kFewest * kFewest, kFewest, kMost);
}

}  // namespace

Tensor score_pages(Tensor query, Tensor page_summary, Tensor seq_lens,
                   std::optional<Tensor> channel_scale, int64_t page_size,
                   StringHandle group_reduce, StringHandle summary, int64_t sketch_bits,
                   std::optional<Tensor> attn_mask, std::optional<double> scale) {
  const SummaryFormat format = check_summary_format(summary, sketch_bits, page_size);
  const ScoreArguments arguments =
      check_score(query, page_summary, seq_lens, channel_scale, check_group_reduce(group_reduce),
                  format, attn_mask, scale);
  const int64_t batch = arguments.batch, num_kv_heads = arguments.num_kv_heads;
  const int64_t num_pages = arguments.num_pages;
  Scratch& scratch = call_scratch();
  scratch.reset();
  int64_t* lengths = scratch.take<int64_t>(batch);
  read_seq_lens(seq_lens, batch, arguments.max_seq_len, lengths);

  const Scoring scoring = {
      arguments.dtype,        arguments.group_reduce, arguments.query,    1,
      arguments.page_summary, arguments.group_size,   arguments.head_dim, arguments.scale};
  const int64_t heads_out = scoring.group_reduce == GroupReduce::kNone ? scoring.group_size : 1;
  Tensor scores =
      new_tensor(query, {batch, num_kv_heads * heads_out, num_pages}, ScalarType::Float);
  float* out = static_cast<float*>(scores.mutable_data_ptr());
  LiveTokens* live = scratch.take<LiveTokens>(batch * num_kv_heads);
  for (int64_t i = 0; i < batch * num_kv_heads; ++i) {
    const int64_t row = i / num_kv_heads, end = lengths[row] / page_size * page_size;
    live[i] = find_live_tokens(scoring, arguments.mask, row, i % num_kv_heads, end, scratch);
  }
  const int64_t task_pages = choose_task_pages(batch * num_kv_heads, num_pages);
  const int64_t parts = ceil_div(num_pages, task_pages);
  const int64_t bytes = batch * num_kv_heads * summary_bytes(scoring, num_pages);
  run_tasks(batch * num_kv_heads * parts, bytes, [&](int64_t i) {
    const int64_t head = i / parts, row = head / num_kv_heads;
    const int64_t first = i % parts * task_pages, last = std::min(first + task_pages, num_pages);
    const int64_t end = std::clamp(lengths[row] / page_size, first, last);
    float* head_scores = out + head * heads_out * num_pages;
    score_page_range(scoring, row, head % num_kv_heads, live[head], first, end, head_scores,
                     num_pages);
    for (int64_t h = 0; h < heads_out; ++h) {
      std::fill(head_scores + h * num_pages + end, head_scores + h * num_pages + last,
                -std::numeric_limits<float>::infinity());
    }
  });
  return scores;
}

}  // namespace quest
