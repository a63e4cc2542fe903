// What the native ops have done in this process.
#pragma once

#include <cstdint>
#include <vector>

namespace quest {

// In the order of quest::native_counters.
enum class Counter {
  kUpdateCalls,
  kPagesSealed,
  kSummariesRebuilt,
  kSparseCalls,
  kSparseCallsCovered,
  kDenseCalls,
  kSparseRows,
  kTokensAttended,
  kMaxTokensAttended,
  kBytesRead,
  kLinearCalls,
  kWeightBytesRead,
  kPrefillCalls,
  kCount,
};

void count(Counter counter, int64_t amount);
void count_maximum(Counter counter, int64_t value);
// The counters in order, and zero from then on if `reset`.
std::vector<int64_t> native_counters(bool reset);

}  // namespace quest
