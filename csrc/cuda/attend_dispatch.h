// The instances of kernel 2 of one dtype: which one serves a call.
#pragma once

#include "cuda/attend_kernel.h"
#include "cuda/launch.h"

namespace quest {
namespace cuda {

// What attends rows of up to kDim values.
template <class T, int kDim>
struct WarpOf {
  using Type = MatrixWarp<T, kDim>;
};
template <int kDim>
struct WarpOf<float, kDim> {
  using Type = ScalarWarp<kDim>;
};

template <class T>
struct AttendInstances {
  static constexpr int kHeads = WarpOf<T, 64>::Type::kHeads;

  static int launch(const AttendCall& p, int64_t num_works, void* stream);

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

 private:
  // Calls f with a pointer to the smallest Warp that holds the rows.
  template <class F>
  static auto visit(const AttendCall& p, const F& f) {
    const int dim = p.rows.head_dim > p.rows.value_dim ? p.rows.head_dim : p.rows.value_dim;
    if (dim <= 64) return f(static_cast<typename WarpOf<T, 64>::Type*>(nullptr));
    if (dim <= 128) return f(static_cast<typename WarpOf<T, 128>::Type*>(nullptr));
    return f(static_cast<typename WarpOf<T, 256>::Type*>(nullptr));
  }
};

// One file per dtype instantiates it.
template <class T>
int AttendInstances<T>::launch(const AttendCall& p, int64_t num_works, void* stream) {
  return visit(p, [&](auto* warp) -> int {
    using Warp = std::remove_pointer_t<decltype(warp)>;
    return cuda::launch(attend_kernel<T, Warp>, num_works, p.num_splits, kThreads,
                        attend_shared_bytes<Warp>(p), p, stream, p.is_next);
  });
}

extern template int AttendInstances<float>::launch(const AttendCall&, int64_t, void*);
extern template int AttendInstances<BFloat16>::launch(const AttendCall&, int64_t, void*);
extern template int AttendInstances<Float16>::launch(const AttendCall&, int64_t, void*);

}  // namespace cuda
}  // namespace quest
