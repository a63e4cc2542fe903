#include "counters.h"
#include "cpu/attention.h"
#include "cpu/ops.h"

namespace quest {

Tensor dense_decode(Tensor query, Tensor key_cache, Tensor value_cache, Tensor seq_lens,
                    std::optional<Tensor> attn_mask, std::optional<double> scale) {
  const Attention a = check_attention(query, key_cache, value_cache, attn_mask, scale);
  const int64_t batch = a.shape.batch, num_q_heads = a.shape.num_q_heads;
  check_seq_lens(seq_lens, query, batch);
  Scratch& scratch = call_scratch();
  scratch.reset();
  const int64_t num_rows = a.shape.num_rows(), q_len = a.shape.q_len;
  int64_t* lengths = scratch.take<int64_t>(num_rows);
  read_query_lens(a, seq_lens, lengths);
  Tensor out = new_output(a);

  Work* works = scratch.take<Work>(num_rows * num_q_heads);
  int64_t num_works = 0, bytes = 0;
  for (int64_t b = 0; b < batch; ++b) {
    num_works += plan_dense_rows(a, b, lengths, nullptr, works + num_works);
    bytes += a.shape.num_kv_heads * cache_bytes(a, lengths[(b + 1) * q_len - 1]);
  }
  attend_all(a, works, num_works, {out.mutable_data_ptr(), nullptr}, scratch);
  count(Counter::kDenseCalls, 1);
  count(Counter::kBytesRead, bytes);
  return out;
}

}  // namespace quest
