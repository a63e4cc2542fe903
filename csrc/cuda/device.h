// What kernels need of the machine, and nothing else: warps, shared memory,
// asynchronous copies, matrix instructions. With QUEST_EMULATED the same
// kernels run as host C++ (emulation/).
#pragma once

#include <stdint.h>

#ifdef QUEST_EMULATED
#include "cuda/emulation/device.h"
#else

#include <cuda_runtime.h>

#include <mutex>
#include <set>
#include <utility>

#define QUEST_DEVICE __device__ __forceinline__
#define QUEST_KERNEL(threads, ctas) __global__ void __launch_bounds__(threads, ctas)
#define QUEST_PARAM const __grid_constant__

namespace quest {
namespace cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

QUEST_DEVICE int thread_index() { return threadIdx.x; }
QUEST_DEVICE int cta_x() { return blockIdx.x; }
QUEST_DEVICE int cta_y() { return blockIdx.y; }

QUEST_DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

QUEST_DEVICE void sync_cta() { __syncthreads(); }
QUEST_DEVICE bool any_in_cta(bool x) { return __syncthreads_or(x); }
QUEST_DEVICE void sync_warp() { __syncwarp(); }
template <class T>
QUEST_DEVICE T shuffle(T x, int lane) {
  return __shfl_sync(kAllLanes, x, lane);
}
template <class T>
QUEST_DEVICE T shuffle_xor(T x, int lanes) {
  return __shfl_xor_sync(kAllLanes, x, lanes);
}
template <class T>
QUEST_DEVICE T shuffle_up(T x, int lanes) {
  return __shfl_up_sync(kAllLanes, x, lanes);
}
QUEST_DEVICE unsigned ballot(bool x) { return __ballot_sync(kAllLanes, x); }
QUEST_DEVICE uint32_t rotate_right(uint32_t x, int n) { return __funnelshift_r(x, x, n); }
QUEST_DEVICE int count_bits(unsigned x) { return __popc(x); }
QUEST_DEVICE int leading_zeros(unsigned x) { return __clz(x); }
// The number of the lowest bit that is set, of a word that is not 0.
QUEST_DEVICE int lowest_bit(unsigned x) { return __ffs(static_cast<int>(x)) - 1; }

QUEST_DEVICE int32_t atomic_add(int32_t* p, int32_t x) { return atomicAdd(p, x); }
QUEST_DEVICE int64_t atomic_add(int64_t* p, int64_t x) {
  return atomicAdd(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(x));
}
// What this thread wrote before is seen by whoever sees what it writes after.
QUEST_DEVICE void fence_device() { __threadfence(); }

// Below 2^-126: zero.
QUEST_DEVICE float power_of_2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
QUEST_DEVICE float natural_log(float x) { return logf(x); }
QUEST_DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
QUEST_DEVICE float multiply(float a, float b) { return __fmul_rn(a, b); }
QUEST_DEVICE float divide(float a, float b) { return __fdiv_rn(a, b); }
QUEST_DEVICE float square_root(float x) { return __fsqrt_rn(x); }
QUEST_DEVICE int nearest_int(float x) { return __float2int_rn(x); }
QUEST_DEVICE double round_up(double x) { return ceil(x); }
QUEST_DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
QUEST_DEVICE uint32_t as_bits(float x) { return __float_as_uint(x); }

QUEST_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes to shared memory, zeros if not `is_live`; both addresses are
// multiples of 16.
QUEST_DEVICE void copy_async(void* shared, const void* global, bool is_live) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(is_live ? 16 : 0)
               : "memory");
}
// 8 bytes; both addresses are multiples of 8.
QUEST_DEVICE void copy_half_async(void* shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(shared_address(shared)), "l"(global)
               : "memory");
}
QUEST_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most kPending of the thread's latest groups are under way.
template <int kPending>
QUEST_DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit values; lane i gives the address of row i % 8 of
// matrix i / 8. Lane i gets elements 2 * (i % 4) and the next of row i / 4 of
// each.
QUEST_DEVICE void load_matrices(const void* row, uint32_t (&x)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(row))
               : "memory");
}
// The same of the transposed matrices.
QUEST_DEVICE void load_transposed(const void* row, uint32_t (&x)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(row))
               : "memory");
}

// c[16, 8] += a[16, 16] b[16, 8], in the layout of mma.m16n8k16.
struct BFloat16;
struct Float16;
template <class T>
QUEST_DEVICE void multiply_matrices(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1);
template <>
QUEST_DEVICE void multiply_matrices<BFloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                              uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
      "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
QUEST_DEVICE void multiply_matrices<Float16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
      "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same of whole numbers, c[16, 8] += a[16, 32] b[32, 8] of signed bytes, in
// the layout of mma.m16n8k32.
QUEST_DEVICE void multiply_bytes(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                 uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, "
      "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// That the grid which follows may be launched, if it is one that waits
// (`is_next` of launch).
QUEST_DEVICE void let_next_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Until the grid before this one has ended and what it wrote is seen.
QUEST_DEVICE void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets a kernel have all the shared memory of a CTA; once per device.
inline cudaError_t allow_all(const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int> > allowed;
  int device = 0, bytes = 0;
  cudaError_t error = cudaGetDevice(&device);
  const std::lock_guard<std::mutex> lock(mutex);
  if (error != cudaSuccess || allowed.count({kernel, device})) return error;
  error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  }
  if (error == cudaSuccess) allowed.insert({kernel, device});
  return error;
}

// Launches `kernel` with `bytes` of shared memory; the result is a cudaError_t.
// is_next: it may begin when all CTAs of the kernel before it have let it, or
// have ended, and waits for that one.
template <class Params>
int launch(void (*kernel)(const Params), int64_t grid_x, int64_t grid_y, int num_threads,
           int64_t bytes, const Params& params, void* stream, bool is_next = false) {
  const void* function = reinterpret_cast<const void*>(kernel);
  const cudaError_t error = allow_all(function);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid_x), static_cast<unsigned>(grid_y));
  config.blockDim = dim3(num_threads);
  config.dynamicSmemBytes = bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &overlap;
  config.numAttrs = is_next ? 1 : 0;
  void* arguments[] = {const_cast<Params*>(&params)};
  return cudaLaunchKernelExC(&config, function, arguments);
}

}  // namespace cuda
}  // namespace quest
#endif
