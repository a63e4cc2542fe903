#include "cpu/ops.h"

namespace quest {

Tensor sparse_decode_step(Tensor query, Tensor key_cache, Tensor value_cache, Tensor cache_position,
                          Tensor page_summary, Tensor num_sealed, Tensor seq_lens,
                          std::optional<Tensor> attn_mask, SparseSettings settings) {
  const SparseArguments arguments =
      check_sparse(query, key_cache, value_cache, page_summary, seq_lens, attn_mask, settings);
  update(check_update(key_cache, cache_position, page_summary, num_sealed, settings.format));
  return decode(arguments, seq_lens);
}

}  // namespace quest
