#include "checks.h"
#include "cpu/ops.h"

namespace quest {

Tensor share_mask(Tensor attn_mask) {
  CHECK_DTYPE(attn_mask, ScalarType::Bool);
  Tensor copy = torch::stable::new_empty(attn_mask, attn_mask.sizes());
  return torch::stable::copy_(copy, attn_mask);
}

}  // namespace quest
