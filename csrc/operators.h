// The operators; schemas and semantics: quest_compile/ops.
#pragma once

#include <optional>
#include <tuple>

#include "operator_arguments.h"

namespace quest {

using OutputAndLse = std::tuple<Tensor, Tensor>;

// Those that every device has.
// OPERATOR(result, name, parameters), parameters in the order of the schema.
#define QUEST_OPERATORS(OPERATOR)                                                                  \
  OPERATOR(void, update_page_summary,                                                              \
           (Tensor key_cache, Tensor cache_position, Tensor page_summary, Tensor num_sealed,       \
            SummaryFormat format))                                                                 \
  OPERATOR(Tensor, score_pages,                                                                    \
           (Tensor query, Tensor page_summary, Tensor seq_lens, std::optional<Tensor> attn_mask,   \
            GroupReduce group_reduce, std::optional<double> scale, SummaryFormat format))          \
  OPERATOR(Tensor, select_pages,                                                                   \
           (Tensor scores, Tensor seq_lens, std::optional<Tensor> attn_mask, Selection selection)) \
  OPERATOR(                                                                                        \
      OutputAndLse, attend_pages,                                                                  \
      (Tensor query, Tensor key_cache, Tensor value_cache, Tensor page_indices, Tensor seq_lens,   \
       std::optional<Tensor> attn_mask, int64_t page_size, std::optional<double> scale))           \
  OPERATOR(Tensor, sparse_decode,                                                                  \
           (Tensor query, Tensor key_cache, Tensor value_cache, Tensor page_summary,               \
            Tensor seq_lens, std::optional<Tensor> attn_mask, SparseSettings settings))            \
  OPERATOR(Tensor, sparse_decode_step,                                                             \
           (Tensor query, Tensor key_cache, Tensor value_cache, Tensor cache_position,             \
            Tensor page_summary, Tensor num_sealed, Tensor seq_lens,                               \
            std::optional<Tensor> attn_mask, SparseSettings settings))                             \
  OPERATOR(Tensor, dense_decode,                                                                   \
           (Tensor query, Tensor key_cache, Tensor value_cache, Tensor seq_lens,                   \
            std::optional<Tensor> attn_mask, std::optional<double> scale))

// Those that have no kernels on other devices.
#define QUEST_CPU_OPERATORS(OPERATOR)                                                  \
  OPERATOR(Tensor, dense_prefill,                                                      \
           (Tensor query, Tensor key_cache, Tensor value_cache, Tensor cache_position, \
            std::optional<Tensor> attn_mask, std::optional<double> scale))

#define QUEST_DECLARE_OPERATOR(result, name, parameters) result name parameters;

QUEST_OPERATORS(QUEST_DECLARE_OPERATOR)  // on CPU tensors
QUEST_CPU_OPERATORS(QUEST_DECLARE_OPERATOR)
namespace cuda {
QUEST_OPERATORS(QUEST_DECLARE_OPERATOR)  // on CUDA tensors
}

}  // namespace quest
