// Argument checks. Their text is the message: what is wrong, what was expected, what came.
#pragma once

#include <optional>
#include <string>

#include "params.h"
#include "stable.h"

// QUEST_CHECK(condition, "page_size: expected ..., got ", page_size)
#define QUEST_CHECK(condition, ...) STD_TORCH_CHECK(condition, "quest: ", __VA_ARGS__)

#define CHECK_DIM(tensor, expected, layout)                                                   \
  QUEST_CHECK((tensor).dim() == (expected), #tensor, ": expected ", expected, " dimensions ", \
              layout, ", got ", ::quest::to_string((tensor).sizes()))

// CHECK_SHAPE(page_summary, batch, num_kv_heads, num_pages, 2, head_dim)
#define CHECK_SHAPE(tensor, ...)                                                       \
  QUEST_CHECK(::quest::has_shape(tensor, {__VA_ARGS__}), #tensor, ": expected shape ", \
              ::quest::to_string({__VA_ARGS__}), " (" #__VA_ARGS__ "), got ",          \
              ::quest::to_string((tensor).sizes()))

#define CHECK_DTYPE(tensor, expected)                                             \
  QUEST_CHECK((tensor).scalar_type() == (expected), #tensor, ": expected dtype ", \
              ::quest::dtype_name(expected), ", got ",                            \
              ::quest::dtype_name((tensor).scalar_type()))

#define CHECK_SAME_DEVICE(tensor, other) \
  QUEST_CHECK(::quest::is_same_device(tensor, other), #tensor, ": expected the device of " #other)

#define CHECK_LAST_DIM_CONTIGUOUS(tensor)                             \
  QUEST_CHECK((tensor).stride((tensor).dim() - 1) == 1, #tensor,      \
              ": expected a contiguous last dimension, got strides ", \
              ::quest::to_string((tensor).strides()))

namespace quest {

using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

std::string to_string(Sizes sizes);
std::string to_string(std::initializer_list<int64_t> sizes);
const char* dtype_name(ScalarType dtype);
bool has_shape(const Tensor& tensor, std::initializer_list<int64_t> shape);
bool is_same_device(const Tensor& tensor, const Tensor& other);

// Errors unless float32, bfloat16 or float16.
DType check_float_dtype(const Tensor& tensor, const char* name);
// Errors unless a multiple of 8 from 8 to 256.
void check_head_dim(int64_t dim, const char* name);
// Errors unless a multiple of 8 from 8 to 128.
void check_page_size(int64_t page_size);

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace quest
