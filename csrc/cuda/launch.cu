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

int launch_score(const ScoreCall& call, void* stream) {
  switch (call.summaries.dtype) {
    case DType::kFloat32:
      return launch_score_float32(call, stream);
    case DType::kBFloat16:
      return launch_score_bfloat16(call, stream);
    default:
      return launch_score_float16(call, stream);
  }
}

int launch_attend(const AttendCall& call, int64_t num_works, void* stream) {
  switch (call.dtype) {
    case DType::kFloat32:
      return launch_attend_float32(call, num_works, stream);
    case DType::kBFloat16:
      return launch_attend_bfloat16(call, num_works, stream);
    default:
      return launch_attend_float16(call, num_works, stream);
  }
}

int64_t attend_bytes(const AttendCall& call) {
  switch (call.dtype) {
    case DType::kFloat32:
      return Float32Instances::bytes(call);
    case DType::kBFloat16:
      return BFloat16Instances::bytes(call);
    default:
      return Float16Instances::bytes(call);
  }
}

int attend_step(const AttendCall& call) {
  return call.dtype == DType::kFloat32 ? Float32Instances::step(call)
                                       : BFloat16Instances::step(call);
}

int max_heads(DType dtype) {
  return dtype == DType::kFloat32 ? ScalarWarp<64>::kHeads : MatrixWarp<BFloat16, 64>::kHeads;
}

int64_t score_bytes(const ScoreCall& call) {
  return call.summaries.rows.format.kind == SummaryKind::kSketch ? sketch_scorer_bytes(call)
                                                                 : page_scorer_bytes(call);
}

}  // namespace cuda
}  // namespace quest
