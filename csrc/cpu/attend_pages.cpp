#include <algorithm>

#include "cpu/attention.h"
#include "cpu/ops.h"
#include "operator_arguments.h"

namespace quest {
namespace {

// A unit that attends the pages listed in `slots`; valid ones are copied to `pages`.
Work plan_listed(const Unit& unit, const int32_t* slots, int64_t slot_stride, int64_t num_slots,
                 int64_t seq_len, int64_t page_size, int32_t* pages) {
  const int64_t num_pages = ceil_div(seq_len, page_size);
  int64_t count = 0;
  bool in_order = true;
  for (int64_t i = 0; i < num_slots; ++i) {
    const int32_t page = slots[i * slot_stride];
    if (page < 0 || page >= num_pages) continue;
    in_order = in_order && page == count;
    pages[count++] = page;
  }
  // Every page in use: the same bits as dense_decode.
  if (in_order && count == num_pages) return plan_dense(unit, seq_len);
  return plan_pages(unit, seq_len, pages, count, page_size);
}

}  // namespace

std::tuple<Tensor, Tensor> attend_pages(Tensor query, Tensor key_cache, Tensor value_cache,
                                        Tensor page_indices, Tensor seq_lens,
                                        std::optional<Tensor> attn_mask, int64_t page_size,
                                        std::optional<double> scale) {
  const Attention a = check_attention(query, key_cache, value_cache, attn_mask, scale);
  check_single_query(query);
  const int64_t batch = a.shape.batch, num_q_heads = a.shape.num_q_heads;
  check_seq_lens(seq_lens, query, batch);
  check_page_size(page_size);
  const int64_t shared = check_page_indices(a, page_indices);
  const int64_t num_slots = page_indices.size(2);
  Scratch& scratch = call_scratch();
  scratch.reset();
  int64_t* lengths = scratch.take<int64_t>(batch);
  read_seq_lens(seq_lens, batch, a.shape.max_seq_len, lengths);
  Tensor out = new_output(a);
  Tensor lse = new_tensor(query, {batch, num_q_heads, 1}, ScalarType::Float);

  const int32_t* slots = static_cast<const int32_t*>(page_indices.const_data_ptr());
  const int64_t num_heads = heads_per_unit(a, shared);
  int32_t* pages = scratch.take<int32_t>(batch * num_q_heads / num_heads * num_slots);
  Work* works = scratch.take<Work>(batch * num_q_heads / num_heads);
  int64_t num_works = 0;
  for (int64_t row = 0; row < batch; ++row) {
    for (int64_t head = 0; head < num_q_heads; head += num_heads) {
      const int32_t* listed =
          slots + row * page_indices.stride(0) + head / shared * page_indices.stride(1);
      works[num_works] =
          plan_listed(make_unit(a, row, head, num_heads), listed, page_indices.stride(2), num_slots,
                      lengths[row], page_size, pages + num_works * num_slots);
      ++num_works;
    }
  }
  attend_all(a, works, num_works,
             {out.mutable_data_ptr(), static_cast<float*>(lse.mutable_data_ptr())}, scratch);
  return {out, lse};
}

}  // namespace quest
