// cuda/device.h as host C++: every CUDA thread is a fiber, warps and CTAs are
// in one address space, and what a GPU leaves to chance is chosen to hurt.
// Shared memory starts as NaN, asynchronous copies arrive when they are waited
// for, warps and CTAs run in an order that depends on a seed.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <functional>
#include <type_traits>

#define QUEST_DEVICE inline
#define QUEST_KERNEL(threads, ctas) void
#define QUEST_PARAM const

namespace quest {
namespace cuda {

int thread_index();
int cta_x();
int cta_y();
char* shared_memory();
void sync_cta();
void sync_warp();
bool any_in_cta(bool x);

// `mine` [8 words] of every lane of the warp, until the next exchange but one.
struct LaneWords {
  uint64_t words[8];
};
const LaneWords* exchange(const void* mine, int bytes);

template <class T>
T from_lane(T x, int lane) {
  T y;
  memcpy(&y, &exchange(&x, sizeof(T))[lane & 31], sizeof(T));
  return y;
}
template <class T>
T shuffle(T x, int lane) {
  return from_lane(x, lane);
}
template <class T>
T shuffle_xor(T x, int lanes) {
  return from_lane(x, (thread_index() & 31) ^ lanes);
}
template <class T>
T shuffle_up(T x, int lanes) {
  const int lane = thread_index() & 31;
  return from_lane(x, lane < lanes ? lane : lane - lanes);
}
unsigned ballot(bool x);
inline uint32_t rotate_right(uint32_t x, int n) { return x >> (n & 31) | x << (-n & 31); }
inline int count_bits(unsigned x) { return __builtin_popcount(x); }
inline int leading_zeros(unsigned x) { return x ? __builtin_clz(x) : 32; }
inline int lowest_bit(unsigned x) { return __builtin_ctz(x); }

inline int32_t atomic_add(int32_t* p, int32_t x) {
  const int32_t old = *p;
  *p += x;
  return old;
}
inline int64_t atomic_add(int64_t* p, int64_t x) {
  const int64_t old = *p;
  *p += x;
  return old;
}
inline void fence_device() {}
inline void let_next_begin() {}
inline void wait_for_previous() {}

inline float power_of_2(float x) { return exp2f(x); }
inline float natural_log(float x) { return logf(x); }
inline float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
inline float multiply(float a, float b) { return a * b; }
inline float divide(float a, float b) { return a / b; }
inline float square_root(float x) { return sqrtf(x); }
inline int nearest_int(float x) { return static_cast<int>(rintf(x)); }
inline double round_up(double x) { return ceil(x); }
template <class To, class From>
To bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From), "");
  To y;
  memcpy(&y, &x, sizeof(x));
  return y;
}
inline float as_float(uint32_t bits) { return bit_cast<float>(bits); }
inline uint32_t as_bits(float x) { return bit_cast<uint32_t>(x); }

inline float half_to_float(uint16_t bits) { return static_cast<float>(bit_cast<_Float16>(bits)); }
inline uint16_t float_to_half(float x) { return bit_cast<uint16_t>(static_cast<_Float16>(x)); }
inline uint16_t float_to_bfloat(float x) {
  const uint32_t bits = as_bits(x);
  if (x != x) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

void copy_async(void* shared, const void* global, bool is_live);
void copy_half_async(void* shared, const void* global);
void commit_copies();
void wait_for_copies_but(int num_pending);
template <int kPending>
void wait_for_copies() {
  wait_for_copies_but(kPending);
}

void load_matrices(const void* row, uint32_t (&x)[4]);
void load_transposed(const void* row, uint32_t (&x)[4]);

struct BFloat16;
struct Float16;
// c += a b in float64 per element, from what `widen` makes of the 16-bit
// values.
void multiply_matrices_of(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                          float (*widen)(uint16_t));
template <class T>
void multiply_matrices(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply_matrices_of(
      c, a, b0, b1, std::is_same<T, Float16>::value ? half_to_float : [](uint16_t bits) {
        return as_float(static_cast<uint32_t>(bits) << 16);
      });
}

void multiply_bytes(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

// 0, or what error_text (launch.h) knows.
int run_grid(int64_t grid_x, int64_t grid_y, int64_t bytes, const std::function<void()>& body);

template <class Params>
int launch(void (*kernel)(const Params), int64_t grid_x, int64_t grid_y, int, int64_t bytes,
           const Params& params, void*, bool = false) {
  return run_grid(grid_x, grid_y, bytes, [&] { kernel(params); });
}

}  // namespace cuda
}  // namespace quest
