#include "counters.h"
#include "cuda/plan.h"
#include "operators.h"

namespace quest {
namespace cuda {

void update_page_summary(Tensor key_cache, Tensor cache_position, Tensor page_summary,
                         Tensor num_sealed, SummaryFormat format) {
  const UpdateArguments u =
      check_update(key_cache, cache_position, page_summary, num_sealed, format);
  count(Counter::kUpdateCalls, 1);
  if (u.batch * u.num_kv_heads == 0) return;
  const OnDevice on(key_cache);
  Workspace workspace(key_cache);
  ScoreCall call = {};
  call.summaries = make_summaries(u.page_summary, u.dtype, u.batch, u.num_kv_heads,
                                  ceil_div(u.max_seq_len, u.page_size), u.head_dim);
  call.update = make_update(u);
  take_scratch(call.update, call.summaries, workspace);
  call.rows.batch = static_cast<int32_t>(u.batch);
  call.rows.q_len = 1;
  plan_score(call, on.device());
  check_launch(launch_score(call, on.stream()), "update_page_summary");
  check_launch(launch_finish({call.summaries, call.update}, on.stream()), "update_page_summary");
}

}  // namespace cuda
}  // namespace quest
