// The operators on CPU tensors; schemas and semantics: quest_compile/ops.
#pragma once

#include <optional>
#include <tuple>

#include "operator_arguments.h"

namespace quest {

void update_page_summary(Tensor key_cache, Tensor cache_position, Tensor page_summary,
                         Tensor num_sealed, std::optional<Tensor> channel_scale, int64_t page_size,
                         StringHandle summary, int64_t sketch_bits);

Tensor score_pages(Tensor query, Tensor page_summary, Tensor seq_lens,
                   std::optional<Tensor> channel_scale, int64_t page_size,
                   StringHandle group_reduce, StringHandle summary, int64_t sketch_bits,
                   std::optional<Tensor> attn_mask, std::optional<double> scale);

Tensor select_pages(Tensor scores, Tensor seq_lens, std::optional<Tensor> attn_mask,
                    int64_t page_budget, int64_t page_size, int64_t num_sink_pages,
                    int64_t num_recent_pages, double budget_fraction, double top_p,
                    double score_scale);

std::tuple<Tensor, Tensor> attend_pages(Tensor query, Tensor key_cache, Tensor value_cache,
                                        Tensor page_indices, Tensor seq_lens,
                                        std::optional<Tensor> attn_mask, int64_t page_size,
                                        std::optional<double> scale);

Tensor sparse_decode(Tensor query, Tensor key_cache, Tensor value_cache, Tensor page_summary,
                     Tensor seq_lens, std::optional<Tensor> attn_mask,
                     std::optional<Tensor> channel_scale, int64_t budget, int64_t page_size,
                     int64_t num_sink_pages, int64_t num_recent_pages, StringHandle group_reduce,
                     StringHandle summary, int64_t sketch_bits, std::optional<double> scale,
                     double budget_fraction, double top_p);

Tensor dense_decode(Tensor query, Tensor key_cache, Tensor value_cache, Tensor seq_lens,
                    std::optional<Tensor> attn_mask, std::optional<double> scale);

Tensor sparse_decode_step(Tensor query, Tensor key_cache, Tensor value_cache, Tensor cache_position,
                          Tensor page_summary, Tensor num_sealed, Tensor seq_lens,
                          std::optional<Tensor> attn_mask, std::optional<Tensor> channel_scale,
                          int64_t budget, int64_t page_size, int64_t num_sink_pages,
                          int64_t num_recent_pages, StringHandle group_reduce, StringHandle summary,
                          int64_t sketch_bits, std::optional<double> scale, double budget_fraction,
                          double top_p);

// update_page_summary and sparse_decode of checked arguments.
void update(const UpdateArguments& u);
Tensor decode(const SparseArguments& arguments, const Tensor& seq_lens);

Tensor share_mask(Tensor attn_mask);

}  // namespace quest
