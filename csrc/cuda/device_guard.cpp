#include "cuda/device_guard.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <mutex>
#include <vector>

#ifndef QUEST_EMULATED
// Of libtorch_cuda, which a torch without CUDA does not have: weak, so that the library loads
// there.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace quest {
namespace cuda {
namespace {

// Properties do not change: they are asked for once per device.
Device properties(int index) {
#ifdef QUEST_EMULATED
  Device emulated;
  check_launch(get_device(index, &emulated), "device properties");
  return emulated;
#else
  static std::mutex mutex;
  static std::vector<Device> known;
  const std::lock_guard<std::mutex> lock(mutex);
  if (static_cast<size_t>(index) >= known.size()) known.resize(index + 1, Device{});
  if (known[index].num_sms == 0) {
    check_launch(get_device(index, &known[index]), "device properties");
  }
  return known[index];
#endif
}

}  // namespace

OnDevice::OnDevice(const Tensor& tensor) {
  const int32_t index = tensor.get_device_index();
#ifndef QUEST_EMULATED
  QUEST_CHECK(aoti_torch_get_current_cuda_stream, "CUDA tensors, but this torch has no CUDA");
  guard_.emplace(index);
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream_));
#endif
  device_ = properties(index);
}

void check_launch(int error, const char* kernel) {
  QUEST_CHECK(error == 0, "CUDA error in ", kernel, ": ", error_text(error));
}

}  // namespace cuda
}  // namespace quest
