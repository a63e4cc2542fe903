// Takes the place of csrc/cpu/scratch.h in sanitizer builds: every piece is an allocation of its
// own and of the exact size, so that AddressSanitizer sees its ends.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

namespace quest {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { reset(); }

  void reset() {
    for (void* piece : pieces_) std::free(piece);
    pieces_.clear();
  }

  template <class T>
  T* take(int64_t count) {
    void* piece = nullptr;
    if (posix_memalign(&piece, 64, static_cast<size_t>(count) * sizeof(T))) throw std::bad_alloc();
    pieces_.push_back(piece);
    return static_cast<T*>(piece);
  }

 private:
  std::vector<void*> pieces_;
};

Scratch& call_scratch();
Scratch& task_scratch();

}  // namespace quest
