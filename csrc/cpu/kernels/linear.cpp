// A linear layer of a few rows: every row of the weight is read once, and multiplied with all rows.
#include "cpu/kernels/dot.h"
#include "params.h"

namespace quest {
namespace QUEST_ISA {
namespace {

// Rows of the weight side by side; rows of the input at a time.
constexpr int kOutputs = 4;
constexpr int kInputs = 4;
constexpr int kMaxSums = kOutputs * kMaxLinearRows;
static_assert(kMaxSums % kWidth == 0, "sums are reduced a vector at a time");
// Elements of a row that are added up before they join the sum of those before. The order of a sum
// is the same whatever is computed beside it.
constexpr int64_t kPart = 1024;

// sums[h * kOutputs + i] += rows[i] . factors[h], over one step; `rest`: over so many elements.
template <class D, int kHere, bool kIsRest>
QUEST_INLINE void add_step(const typename D::Element* const* rows, const typename D::Query* factors,
                           int64_t factor_stride, int64_t d, int rest, V* sums) {
  typename D::Span factor[kHere];
  QUEST_UNROLL
  for (int h = 0; h < kHere; ++h) factor[h] = D::load_query(factors + h * factor_stride + d);
  QUEST_UNROLL
  for (int i = 0; i < kOutputs; ++i) {
    typename D::Span row;
    if constexpr (kIsRest) {
      row = D::load(rows[i] + d, rest);
    } else {
      row = D::load(rows[i] + d);
    }
    QUEST_UNROLL
    for (int h = 0; h < kHere; ++h) {
      sums[h * kOutputs + i] = D::accumulate(sums[h * kOutputs + i], row, factor[h]);
    }
  }
}

// sums[h * kOutputs + i] += rows[i] . factors[h]. Meanwhile what lies `ahead` elements behind the
// rows comes to the L2 cache; 0: nothing.
template <class D, int kHere>
void add_part(const typename D::Element* const* rows, int64_t ahead,
              const typename D::Query* factors, int64_t factor_stride, int64_t size, V* sums) {
  constexpr int kBytes = D::kStep * sizeof(typename D::Element);
  V part[kOutputs * kHere];
  QUEST_UNROLL
  for (int i = 0; i < kOutputs * kHere; ++i) part[i] = zero();
  int64_t d = 0;
  for (; d + D::kStep <= size; d += D::kStep) {
    if (ahead && d * sizeof(typename D::Element) % 64 == 0) {
      QUEST_UNROLL
      for (int i = 0; i < kOutputs; ++i) prefetch(rows[i] + d + ahead, kBytes);
    }
    add_step<D, kHere, false>(rows, factors, factor_stride, d, 0, part);
  }
  if (d < size) {
    const int rest = static_cast<int>(size - d);
    add_step<D, kHere, true>(rows, factors, factor_stride, d, rest, part);
  }
  QUEST_UNROLL
  for (int i = 0; i < kOutputs * kHere; ++i) sums[i] = sums[i] + part[i];
}

// sums[h * kOutputs + i] = rows[i] . input row h
template <class T>
void multiply(const LinearParams& p, const T* const* first, int64_t ahead, V* sums) {
  using D = Dot<T>;
  for (int i = 0; i < kMaxSums; ++i) sums[i] = zero();
  const T* rows[kOutputs];
  for (int64_t d = 0; d < p.in_features; d += kPart) {
    const int64_t size = p.in_features - d < kPart ? p.in_features - d : kPart;
    for (int i = 0; i < kOutputs; ++i) rows[i] = first[i] + d;
    const int64_t stride = p.factor_stride;
    int64_t wanted = ahead;
    for (int h = 0; h < p.num_rows; wanted = 0) {
      const auto* factors = static_cast<const typename D::Query*>(p.factors) + h * stride + d;
      V* here = sums + h * kOutputs;
      if (p.num_rows - h >= kInputs) {
        add_part<D, kInputs>(rows, wanted, factors, stride, size, here);
        h += kInputs;
      } else if (p.num_rows - h >= 2) {
        add_part<D, 2>(rows, wanted, factors, stride, size, here);
        h += 2;
      } else {
        add_part<D, 1>(rows, wanted, factors, stride, size, here);
        h += 1;
      }
    }
  }
}

// Outputs [first, first + count), count <= kOutputs.
template <class T>
void finish(const LinearParams& p, int64_t first, int count, const V* sums) {
  float values[kMaxSums];
  T rounded[kMaxSums];
  float biases[kPairWidth] = {};
  if (p.bias) {
    T bias[kPairWidth] = {};
    memcpy(bias, static_cast<const T*>(p.bias) + first, count * sizeof(T));
    widen_row(bias, kPairWidth, biases);
  }
  for (int i = 0; i < p.num_rows * kOutputs; i += kWidth) store(values + i, reduce_rows(sums + i));
  if (p.bias) {
    for (int i = 0; i < p.num_rows * kOutputs; ++i) values[i] += biases[i % kOutputs];
  }
  for (int i = 0; i < p.num_rows * kOutputs; i += kWidth) store_as(rounded + i, load(values + i));
  for (int h = 0; h < p.num_rows; ++h) {
    memcpy(static_cast<T*>(p.out) + h * p.out_features + first, rounded + h * kOutputs,
           count * sizeof(T));
  }
}

template <class T>
void linear_of(const LinearParams& p) {
  const T* weight = static_cast<const T*>(p.weight);
  for (int64_t first = p.first_output; first < p.last_output; first += kOutputs) {
    const int64_t left = p.last_output - first;
    const int count = left < kOutputs ? static_cast<int>(left) : kOutputs;
    const T* rows[kOutputs];
    for (int i = 0; i < kOutputs; ++i) {
      rows[i] = weight + (first + (i < count ? i : count - 1)) * p.weight_stride;
    }
    V sums[kMaxSums];
    multiply<T>(p, rows, left >= 2 * kOutputs ? kOutputs * p.weight_stride : 0, sums);
    finish<T>(p, first, count, sums);
  }
}

template <class T>
void prepare_rows(const LinearParams& p) {
  using D = Dot<T>;
  const T* input = static_cast<const T*>(p.input);
  auto* factors = static_cast<typename D::Query*>(p.factors);
  for (int h = 0; h < p.num_rows; ++h) {
    D::prepare(input + h * p.input_stride, static_cast<int>(p.in_features),
               factors + h * p.factor_stride);
  }
}

}  // namespace

void prepare_linear(const LinearParams& p) {
  switch (p.dtype) {
    case DType::kFloat32:
      return prepare_rows<float>(p);
    case DType::kBFloat16:
      return prepare_rows<BFloat16>(p);
    case DType::kFloat16:
      return prepare_rows<Float16>(p);
  }
}

void linear(const LinearParams& p) {
  switch (p.dtype) {
    case DType::kFloat32:
      return linear_of<float>(p);
    case DType::kBFloat16:
      return linear_of<BFloat16>(p);
    case DType::kFloat16:
      return linear_of<Float16>(p);
  }
}

}  // namespace QUEST_ISA
}  // namespace quest
