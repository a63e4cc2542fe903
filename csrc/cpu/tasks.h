// Work of one op call, split into tasks: one parallel region, tasks handed out one by one.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

#include "stable.h"

namespace quest {

// Below this many bytes to read, waking threads costs more than it saves.
constexpr int64_t kSerialBytes = 256 * 1024;

// Runs task(0), ..., task(count - 1), each once, on torch's threads. Tasks are handed out in
// ascending order, so a task may wait (wait_for_zero) for tasks before it. `bytes`: what all of
// them read.
template <class Task>
void run_tasks(int64_t count, int64_t bytes, const Task& task) {
  const int64_t num_threads = torch::stable::get_num_threads();
  if (num_threads == 1 || count <= 1 || bytes < kSerialBytes) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(
      0, count < num_threads ? count : num_threads, 1, [&](int64_t, int64_t) {
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) task(i);
      });
}

// Counts what must be done before something else may begin.
using Countdown = std::atomic<int32_t>;

inline void wait_for_zero(const Countdown& pending) {
  for (int spins = 0; pending.load(std::memory_order_acquire) != 0; ++spins) {
    if (spins >= 1000) {
      std::this_thread::yield();
#if defined(__x86_64__)
    } else {
      __builtin_ia32_pause();
#endif
    }
  }
}

// True for the caller that was the last to finish.
inline bool finish_one(Countdown& pending) {
  return pending.fetch_sub(1, std::memory_order_acq_rel) == 1;
}

}  // namespace quest
