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
                   std::optional<Tensor> attn_mask, GroupReduce group_reduce,
                   std::optional<double> scale, SummaryFormat format) {
  const ScoreArguments arguments =
      check_score(query, page_summary, seq_lens, attn_mask, group_reduce, scale, format);
  const int64_t batch = arguments.batch, num_kv_heads = arguments.num_kv_heads;
  const int64_t num_pages = arguments.num_pages, num_groups = batch * num_kv_heads;
  Scratch& scratch = call_scratch();
  scratch.reset();
  int64_t* lengths = scratch.take<int64_t>(batch);
  read_seq_lens(seq_lens, batch, arguments.max_seq_len, lengths);
  const Scoring& scoring = arguments;
  const auto num_complete = [&](int64_t group) {
    return lengths[group / num_kv_heads] / format.page_size;
  };

  const int64_t heads_out = scoring.heads_selecting(), heads_scored = scoring.heads_scored();
  Tensor result =
      new_tensor(query, {batch, num_kv_heads * heads_out, num_pages}, ScalarType::Float);
  float* out = static_cast<float*>(result.mutable_data_ptr());
  const bool is_joined = group_reduce == GroupReduce::kSoftmax;
  float* scores = is_joined ? scratch.take<float>(num_groups * heads_scored * num_pages) : out;
  LiveTokens* live = scratch.take<LiveTokens>(num_groups);
  for (int64_t i = 0; i < num_groups; ++i) {
    live[i] = find_live_tokens(scoring, arguments.mask, i / num_kv_heads, i % num_kv_heads,
                               num_complete(i) * format.page_size, scratch);
  }
  const int64_t task_pages = choose_task_pages(num_groups, num_pages);
  const int64_t parts = ceil_div(num_pages, task_pages);
  run_tasks(num_groups * parts, num_groups * summary_bytes(scoring, num_pages), [&](int64_t i) {
    const int64_t group = i / parts, first = i % parts * task_pages;
    score_page_range(scoring, group / num_kv_heads, group % num_kv_heads, live[group], first,
                     std::min(first + task_pages, num_complete(group)),
                     scores + group * heads_scored * num_pages, num_pages);
  });
  const int64_t score_bytes = num_groups * heads_scored * num_pages * 4;
  run_tasks(num_groups, is_joined ? score_bytes : 0, [&](int64_t i) {
    Scratch& mine = task_scratch();
    mine.reset();
    float* of_group = out + i * heads_out * num_pages;
    if (is_joined) {
      join_scores(scoring, arguments.mask, i / num_kv_heads, i % num_kv_heads, num_complete(i),
                  scores + i * heads_scored * num_pages, num_pages, of_group, mine);
    }
    for (int64_t h = 0; h < heads_out; ++h) {
      std::fill(of_group + h * num_pages + num_complete(i), of_group + (h + 1) * num_pages,
                -std::numeric_limits<float>::infinity());
    }
  });
  return result;
}

}  // namespace quest
