// Where an operator on CUDA tensors runs: their device, the current stream of torch.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "checks.h"
#include "cuda/launch.h"

namespace quest {
namespace cuda {

class OnDevice {
 public:
  // Makes the device of `tensor` the current one as long as this lives. Errors without CUDA.
  explicit OnDevice(const Tensor& tensor);

  void* stream() const { return stream_; }
  const Device& device() const { return device_; }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  void* stream_ = nullptr;
  Device device_{};
};

// Errors unless a launch succeeded.
void check_launch(int error, const char* kernel);

}  // namespace cuda
}  // namespace quest
