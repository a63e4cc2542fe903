#include "checks.h"

#include <sstream>

namespace quest {
namespace {

std::string join(const int64_t* sizes, size_t count) {
  std::ostringstream text;
  text << "[";
  for (size_t i = 0; i < count; ++i) text << (i ? ", " : "") << sizes[i];
  text << "]";
  return text.str();
}

}  // namespace

std::string to_string(Sizes sizes) { return join(sizes.data(), sizes.size()); }
std::string to_string(std::initializer_list<int64_t> sizes) {
  return join(sizes.begin(), sizes.size());
}

const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    default:
      return "another type";
  }
}

bool has_shape(const Tensor& tensor, std::initializer_list<int64_t> shape) {
  const Sizes sizes = tensor.sizes();
  if (sizes.size() != shape.size()) return false;
  return std::equal(shape.begin(), shape.end(), sizes.begin());
}

bool is_same_device(const Tensor& tensor, const Tensor& other) {
  int32_t type = 0, other_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(other.get(), &other_type));
  return type == other_type && tensor.get_device_index() == other.get_device_index();
}

DType check_float_dtype(const Tensor& tensor, const char* name) {
  const ScalarType dtype = tensor.scalar_type();
  switch (dtype) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      QUEST_CHECK(false, name, ": expected dtype float32, bfloat16 or float16, got ",
                  dtype_name(dtype));
  }
  return DType::kFloat32;
}

void check_head_dim(int64_t dim, const char* name) {
  QUEST_CHECK(dim >= 8 && dim <= kMaxHeadDim && dim % 8 == 0, name,
              ": expected a last dimension that is a multiple of 8 from 8 to 256, got ", dim);
}

void check_page_size(int64_t page_size) {
  QUEST_CHECK(page_size >= 8 && page_size <= 128 && page_size % 8 == 0,
              "page_size: expected a multiple of 8 from 8 to 128, got ", page_size);
}

}  // namespace quest
