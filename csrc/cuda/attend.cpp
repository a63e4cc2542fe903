#include "counters.h"
#include "cuda/plan.h"
#include "operators.h"

namespace quest {
namespace cuda {
namespace {

// A planned call on its own: nothing has cleared the arrivals.
void attend(AttendCall& call, const OnDevice& on, const Tensor& like, const char* name) {
  const int64_t num_works = plan_attend(call, on.device());
  Workspace workspace(like);
  take_scratch(call, num_works, workspace);
  if (call.arrivals) {
    const int64_t bytes = num_works * static_cast<int64_t>(sizeof(int32_t));
    check_launch(clear(call.arrivals, bytes, on.stream()), name);
  }
  check_launch(launch_attend(call, num_works, on.stream()), name);
}

}  // namespace

std::tuple<Tensor, Tensor> attend_pages(Tensor query, Tensor key_cache, Tensor value_cache,
                                        Tensor page_indices, Tensor seq_lens,
                                        std::optional<Tensor> attn_mask, int64_t page_size,
                                        std::optional<double> scale) {
  const Attention a = check_attention(query, key_cache, value_cache, attn_mask, scale);
  check_single_query(query);
  check_seq_lens(seq_lens, query, a.shape.batch);
  check_page_size(page_size);
  const int64_t heads_per_list = check_page_indices(a, page_indices);
  Tensor out = new_output(a);
  Tensor lse = new_tensor(query, {a.shape.batch, a.shape.num_q_heads, 1}, ScalarType::Float);
  if (a.shape.batch == 0) return {out, lse};
  const OnDevice on(query);
  AttendCall call = make_attend(a, seq_lens, out);
  call.attended = Attended::kListed;
  call.selection.page_size = page_size;
  call.heads_per_select = static_cast<int32_t>(heads_per_list);
  call.selects_per_group = static_cast<int32_t>(a.shape.group_size / heads_per_list);
  call.page_indices = static_cast<const int32_t*>(page_indices.const_data_ptr());
  for (int i = 0; i < 3; ++i) call.indices_strides[i] = page_indices.stride(i);
  call.num_slots = static_cast<int32_t>(page_indices.size(2));
  call.lse = static_cast<float*>(lse.mutable_data_ptr());
  attend(call, on, query, "attend_pages");
  return {out, lse};
}

Tensor dense_decode(Tensor query, Tensor key_cache, Tensor value_cache, Tensor seq_lens,
                    std::optional<Tensor> attn_mask, std::optional<double> scale) {
  const Attention a = check_attention(query, key_cache, value_cache, attn_mask, scale);
  check_seq_lens(seq_lens, query, a.shape.batch);
  Tensor out = new_output(a);
  count(Counter::kDenseCalls, 1);
  if (a.shape.batch == 0) return out;
  const OnDevice on(query);
  AttendCall call = make_attend(a, seq_lens, out);
  attend(call, on, query, "dense_decode");
  return out;
}

}  // namespace cuda
}  // namespace quest
