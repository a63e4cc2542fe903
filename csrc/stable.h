// The one place that includes the LibTorch stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace quest {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

}  // namespace quest
