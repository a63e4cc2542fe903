#include "arguments.h"
#include "counters.h"
#include "cpu/dispatch.h"
#include "cpu/ops.h"
#include "cpu/scratch.h"
#include "cpu/tasks.h"

namespace quest {
namespace {

// Of the weight, a task at most; and tasks of a thread at least, as threads are not equally fast.
constexpr int64_t kTaskBytes = 512 * 1024;
constexpr int64_t kTasksPerThread = 4;
constexpr int64_t kOutputMultiple = 4;

int64_t outputs_of_task(int64_t out_features, int64_t row_bytes) {
  const int64_t tasks = torch::stable::get_num_threads() * kTasksPerThread;
  const int64_t outputs = std::min(kTaskBytes / row_bytes, ceil_div(out_features, tasks));
  return std::max<int64_t>(1, ceil_div(outputs, kOutputMultiple)) * kOutputMultiple;
}

// x as rows side by side, with a contiguous last dimension.
struct Rows {
  Tensor owner;
  int64_t count;
  int64_t stride;
};

Rows rows_of(const Tensor& x) {
  const int64_t dims = x.dim();
  QUEST_CHECK(dims >= 1, "x: expected at least 1 dimension [..., in_features], got []");
  int64_t count = 1;
  for (int64_t i = 0; i + 1 < dims; ++i) count *= x.size(i);
  const bool is_matrix = dims == 2 && x.stride(1) == 1;
  return {is_matrix ? x : torch::stable::contiguous(x), count,
          is_matrix ? x.stride(0) : x.size(dims - 1)};
}

Tensor new_output(const Tensor& x, int64_t out_features) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = out_features;
  return torch::stable::new_empty(x, Sizes(shape.data(), shape.size()));
}

}  // namespace

Tensor linear_decode(Tensor x, Tensor weight, std::optional<Tensor> bias) {
  LinearParams p = {};
  p.dtype = check_float_dtype(x, "x");
  CHECK_DIM(weight, 2, "[out_features, in_features]");
  p.out_features = weight.size(0);
  p.in_features = weight.size(1);
  const Rows rows = rows_of(x);
  QUEST_CHECK(x.size(x.dim() - 1) == p.in_features, "x: expected the ", p.in_features,
              " in_features of weight last, got ", to_string(x.sizes()));
  QUEST_CHECK(rows.count >= 1 && rows.count <= kMaxLinearRows, "x: expected from 1 to ",
              kMaxLinearRows, " rows, got ", rows.count);
  QUEST_CHECK(p.in_features >= 8 && p.in_features % 8 == 0 && p.in_features < INT32_MAX,
              "weight: expected in_features that are a multiple of 8, got ", p.in_features);
  CHECK_DTYPE(weight, x.scalar_type());
  CHECK_SAME_DEVICE(weight, x);
  CHECK_LAST_DIM_CONTIGUOUS(weight);
  const int64_t out_features = p.out_features;
  if (bias) {
    const Tensor& given = *bias;
    QUEST_CHECK(has_shape(given, {out_features}), "bias: expected shape ",
                to_string({out_features}), " (out_features), got ", to_string(given.sizes()));
    QUEST_CHECK(given.scalar_type() == x.scalar_type(), "bias: expected dtype ",
                dtype_name(x.scalar_type()), ", got ", dtype_name(given.scalar_type()));
    QUEST_CHECK(is_same_device(given, x), "bias: expected the device of x");
  }
  const Tensor bias_owner = bias ? torch::stable::contiguous(*bias) : x;
  Tensor out = new_output(x, out_features);

  Scratch& scratch = call_scratch();
  scratch.reset();
  p.num_rows = static_cast<int32_t>(rows.count);
  p.input = rows.owner.const_data_ptr();
  p.input_stride = rows.stride;
  p.factor_stride = ceil_div(p.in_features, kPartialAlignment) * kPartialAlignment;
  p.factors = scratch.take<float>(p.num_rows * p.factor_stride);
  p.weight = weight.const_data_ptr();
  p.weight_stride = weight.stride(0);
  p.bias = bias ? bias_owner.const_data_ptr() : nullptr;
  p.out = out.mutable_data_ptr();
  kernels().prepare_linear(p);

  const int64_t row_bytes = p.in_features * element_size(p.dtype);
  const int64_t outputs = outputs_of_task(out_features, row_bytes),
                bytes = out_features * row_bytes;
  run_tasks(ceil_div(out_features, outputs), bytes, [&](int64_t task) {
    LinearParams part = p;
    part.first_output = task * outputs;
    part.last_output = std::min(part.first_output + outputs, out_features);
    kernels().linear(part);
  });
  count(Counter::kLinearCalls, 1);
  count(Counter::kWeightBytesRead, bytes);
  return out;
}

}  // namespace quest
