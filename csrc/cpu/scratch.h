// Memory that a thread keeps from call to call.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

namespace quest {

// Hands out pieces of one allocation, which grows until a whole call fits in it.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    release_extra();
    std::free(memory_);
  }

  // Takes back everything handed out.
  void reset() {
    if (!extra_.empty()) {
      release_extra();
      std::free(memory_);
      capacity_ = used_ + used_ / 2;
      memory_ = allocate(capacity_);
    }
    used_ = 0;
  }

  // Uninitialised, on a cache line of its own.
  template <class T>
  T* take(int64_t count) {
    const size_t bytes =
        (static_cast<size_t>(count) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    used_ += bytes;
    if (used_ <= capacity_) return reinterpret_cast<T*>(memory_ + used_ - bytes);
    extra_.push_back(nullptr);
    return reinterpret_cast<T*>(extra_.back() = allocate(bytes));
  }

 private:
  static constexpr size_t kAlignment = 64;

  static char* allocate(size_t bytes) {
    const size_t whole = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    void* memory = std::aligned_alloc(kAlignment, whole ? whole : kAlignment);
    if (!memory) throw std::bad_alloc();
    return static_cast<char*>(memory);
  }
  void release_extra() {
    for (char* each : extra_) std::free(each);
    extra_.clear();
  }

  char* memory_ = nullptr;
  size_t capacity_ = 0;
  size_t used_ = 0;
  std::vector<char*> extra_;  // what did not fit
};

// Of the thread that called the op, for what its tasks share; of the thread that runs a task.
Scratch& call_scratch();
Scratch& task_scratch();

}  // namespace quest
