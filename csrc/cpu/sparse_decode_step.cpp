#include "cpu/ops.h"

namespace quest {

Tensor sparse_decode_step(Tensor query, Tensor key_cache, Tensor value_cache, Tensor cache_position,
                          Tensor page_summary, Tensor num_sealed, Tensor seq_lens,
                          std::optional<Tensor> attn_mask, std::optional<Tensor> channel_scale,
                          int64_t budget, int64_t page_size, int64_t num_sink_pages,
                          int64_t num_recent_pages, StringHandle group_reduce, StringHandle summary,
                          int64_t sketch_bits, std::optional<double> scale, double budget_fraction,
                          double top_p) {
  const SummaryFormat format = check_summary_format(summary, sketch_bits, page_size);
  const GroupReduce reduce = check_group_reduce(group_reduce);
  const SparseArguments arguments = check_sparse(
      query, key_cache, value_cache, page_summary, seq_lens, attn_mask, channel_scale, budget,
      num_sink_pages, num_recent_pages, reduce, format, scale, budget_fraction, top_p);
  update(check_update(key_cache, cache_position, page_summary, num_sealed, channel_scale, format));
  return decode(arguments, seq_lens);
}

}  // namespace quest
