// The instances of kernel 2 of one dtype: which one serves a call.
#pragma once

#include "cuda/attend_kernel.h"
#include "cuda/launch.h"

namespace quest {
namespace cuda {

template <class T, template <int> class Warp>
struct AttendInstances {
  // Calls f with a value of the smallest Warp that holds the rows.
  template <class F>
  static auto visit(const AttendCall& p, const F& f) {
    const int dim = p.rows.head_dim > p.rows.value_dim ? p.rows.head_dim : p.rows.value_dim;
    if (dim <= 64) return f(static_cast<Warp<64>*>(nullptr));
    if (dim <= 128) return f(static_cast<Warp<128>*>(nullptr));
    return f(static_cast<Warp<256>*>(nullptr));
  }

  static int64_t bytes(const AttendCall& p) {
    return visit(p, [&](auto* warp) -> int64_t {
      return attend_shared_bytes<std::remove_pointer_t<decltype(warp)>>(p);
    });
  }

  static int step(const AttendCall& p) {
    return visit(p, [](auto* warp) -> int {
      return std::remove_pointer_t<decltype(warp)>::kNumWarps * kTileTokens;
    });
  }

  static int launch(const AttendCall& p, int64_t num_works, void* stream) {
    return visit(p, [&](auto* warp) -> int {
      using W = std::remove_pointer_t<decltype(warp)>;
      return cuda::launch(attend_kernel<T, W>, num_works, p.num_splits, kThreads,
                          attend_shared_bytes<W>(p), p, stream, p.is_next);
    });
  }
};

template <int kDim>
using BFloat16Warp = MatrixWarp<BFloat16, kDim>;
template <int kDim>
using Float16Warp = MatrixWarp<Float16, kDim>;

using Float32Instances = AttendInstances<float, ScalarWarp>;
using BFloat16Instances = AttendInstances<BFloat16, BFloat16Warp>;
using Float16Instances = AttendInstances<Float16, Float16Warp>;

int launch_attend_float32(const AttendCall& p, int64_t num_works, void* stream);
int launch_attend_bfloat16(const AttendCall& p, int64_t num_works, void* stream);
int launch_attend_float16(const AttendCall& p, int64_t num_works, void* stream);

}  // namespace cuda
}  // namespace quest
