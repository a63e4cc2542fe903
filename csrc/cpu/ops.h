// Operators and their parts on CPU tensors.
#pragma once

#include "operators.h"

namespace quest {

// update_page_summary and sparse_decode of checked arguments.
void update(const UpdateArguments& u);
Tensor decode(const SparseArguments& arguments, const Tensor& seq_lens);

Tensor share_mask(Tensor attn_mask);

}  // namespace quest
