#include "cuda/attend_dispatch.h"
#include "cuda/launch.h"
#include "cuda/score_dispatch.h"

namespace quest {
namespace cuda {

#ifndef QUEST_EMULATED
int get_device(int index, Device* device) {
  int sms = 0, bytes = 0, major = 0;
  cudaError_t error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, index);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
  }
  *device = {index, sms, bytes, major >= 9};
  return error;
}

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int clear(void* memory, int64_t bytes, void* stream) {
  return cudaMemsetAsync(memory, 0, bytes, static_cast<cudaStream_t>(stream));
}
#endif

namespace {

// Calls f with a pointer to the type of the numbers.
template <class F>
auto visit_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(static_cast<float*>(nullptr));
    case DType::kBFloat16:
      return f(static_cast<BFloat16*>(nullptr));
    default:
      return f(static_cast<Float16*>(nullptr));
  }
}

template <class T>
ScoreInstances<T> score_instances(T*) {
  return {};
}
template <class T>
AttendInstances<T> attend_instances(T*) {
  return {};
}

}  // namespace

int launch_score(const ScoreCall& call, void* stream) {
  return visit_dtype(call.summaries.dtype,
                     [&](auto* t) { return score_instances(t).launch(call, stream); });
}

int64_t score_bytes(const ScoreCall& call) {
  return visit_dtype(call.summaries.dtype, [&](auto* t) { return score_instances(t).bytes(call); });
}

int pages_per_step(const Summaries& s) {
  return visit_dtype(s.dtype, [&](auto* t) { return score_instances(t).pages_per_step(s); });
}

int launch_attend(const AttendCall& call, int64_t num_works, void* stream) {
  return visit_dtype(call.dtype,
                     [&](auto* t) { return attend_instances(t).launch(call, num_works, stream); });
}

int64_t attend_bytes(const AttendCall& call) {
  return visit_dtype(call.dtype, [&](auto* t) { return attend_instances(t).bytes(call); });
}

int attend_step(const AttendCall& call) {
  return visit_dtype(call.dtype, [&](auto* t) { return attend_instances(t).step(call); });
}

int max_heads(DType dtype) {
  return visit_dtype(dtype, [](auto* t) { return int{decltype(attend_instances(t))::kHeads}; });
}

}  // namespace cuda
}  // namespace quest
