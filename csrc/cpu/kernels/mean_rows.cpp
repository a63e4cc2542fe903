// Rows [mean, standard deviation]. Compiled without contraction, and sums have an order: the same
// keys give the same bits on every machine.
#include "cpu/kernels/floats8.h"
#include "cpu/kernels/mean.h"

namespace quest {
namespace QUEST_ISA {
namespace {

// Every NaN is written as the same one.
QUEST_INLINE Float8 one_nan(Float8 x) { return x == x ? x : all(bit_cast<float>(0x7fc00000)); }

template <class T>
void store_keys(T* p, Float8 x) {
  float values[8];
  store_floats(values, one_nan(x));
  for (int i = 0; i < 8; i += kWidth) {
    float wide[kWidth] = {};
    memcpy(wide, values + i, (kWidth < 8 ? kWidth : 8) * sizeof(float));
    T narrow[kWidth];
    store_as(narrow, load(wide));
    memcpy(p + i, narrow, (kWidth < 8 ? kWidth : 8) * sizeof(T));
  }
}

// Relative to the first key, so that keys that are all the same have no deviation.
template <class T>
void mean_page_of(const PageSummaryParams& p, int64_t page, T* row) {
  const T* keys = static_cast<const T*>(p.key) + page * p.page_size * p.key_stride;
  const float inverse = 1.0f / static_cast<float>(p.page_size);
  for (int d = 0; d < p.head_dim; d += 8) {
    const Float8 first = load_keys(keys + d);
    Float8 shift = {};
    for (int t = 0; t < p.page_size; ++t) {
      shift += (load_keys(keys + t * p.key_stride + d) - first) * inverse;
    }
    Float8 sum = {};
    for (int t = 0; t < p.page_size; ++t) {
      const Float8 x = (load_keys(keys + t * p.key_stride + d) - first) - shift;
      sum += x * x;
    }
    const Float8 variance = sum * inverse;
    Float8 deviation;
    for (int i = 0; i < 8; ++i) deviation[i] = __builtin_sqrtf(variance[i]);
    store_keys(row + d, first + shift);
    store_keys(row + p.head_dim + d, deviation);
  }
}

}  // namespace

void mean_page(const PageSummaryParams& p, int64_t page, char* row) {
  switch (p.dtype) {
    case DType::kFloat32:
      return mean_page_of(p, page, reinterpret_cast<float*>(row));
    case DType::kBFloat16:
      return mean_page_of(p, page, reinterpret_cast<BFloat16*>(row));
    case DType::kFloat16:
      return mean_page_of(p, page, reinterpret_cast<Float16*>(row));
  }
}

}  // namespace QUEST_ISA
}  // namespace quest
