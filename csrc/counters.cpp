#include "counters.h"

#include <atomic>

namespace quest {
namespace {

// One line each: ops of several threads count at the same time.
struct alignas(64) Slot {
  std::atomic<int64_t> value{0};
};

Slot slots[static_cast<int>(Counter::kCount)];

std::atomic<int64_t>& slot(Counter counter) { return slots[static_cast<int>(counter)].value; }

}  // namespace

void count(Counter counter, int64_t amount) {
  if (amount) slot(counter).fetch_add(amount, std::memory_order_relaxed);
}

void count_maximum(Counter counter, int64_t value) {
  int64_t seen = slot(counter).load(std::memory_order_relaxed);
  while (seen < value &&
         !slot(counter).compare_exchange_weak(seen, value, std::memory_order_relaxed)) {
  }
}

std::vector<int64_t> native_counters(bool reset) {
  std::vector<int64_t> values;
  for (Slot& each : slots) {
    values.push_back(reset ? each.value.exchange(0, std::memory_order_relaxed)
                           : each.value.load(std::memory_order_relaxed));
  }
  return values;
}

}  // namespace quest
