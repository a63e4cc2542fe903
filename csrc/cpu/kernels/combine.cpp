// Merges the partial results of the splits of a token list and normalises them.
#include "cpu/kernels/vec.h"
#include "params.h"

namespace quest {
namespace QUEST_ISA {
namespace {

template <class T>
void combine_head(const CombineParams& p, int head) {
  float top = -kInfinity;
  for (int s = 0; s < p.num_splits; ++s) {
    const float maximum = p.maxima[s * p.num_heads + head];
    top = maximum > top ? maximum : top;
  }
  // Only logits of -inf, or none at all: every sum is 0.
  const float shift = top == -kInfinity ? 0 : top;
  float factors[kMaxSplits];
  float total = 0;
  for (int s = 0; s < p.num_splits; ++s) {
    float lanes[kWidth];
    store(lanes, exp2(set1(p.maxima[s * p.num_heads + head] - shift)));
    factors[s] = lanes[0];
    total += factors[s] * p.sums[s * p.num_heads + head];
  }
  const V inverse = set1(total == 0 ? 0 : 1 / total);
  T* out = static_cast<T*>(p.out) + head * p.value_dim;
  for (int d = 0; d < p.value_dim; d += kWidth) {
    V sum = zero();
    for (int s = 0; s < p.num_splits; ++s) {
      const float* values = p.values + (s * p.num_heads + head) * p.values_stride;
      sum = fma(load(values + d), set1(factors[s]), sum);
    }
    if (d + kWidth <= p.value_dim) {
      store_as(out + d, sum * inverse);
    } else {
      T rest[kWidth];
      store_as(rest, sum * inverse);
      memcpy(out + d, rest, (p.value_dim - d) * sizeof(T));
    }
  }
  if (p.lse) {
    constexpr float kLn2 = 0.693147180559945f;
    p.lse[head] = total == 0 ? -kInfinity : top * kLn2 + __builtin_logf(total);
  }
}

}  // namespace

void combine(const CombineParams& p) {
  for (int h = 0; h < p.num_heads; ++h) {
    switch (p.dtype) {
      case DType::kFloat32:
        combine_head<float>(p, h);
        break;
      case DType::kBFloat16:
        combine_head<BFloat16>(p, h);
        break;
      case DType::kFloat16:
        combine_head<Float16>(p, h);
        break;
    }
  }
}

}  // namespace QUEST_ISA
}  // namespace quest
