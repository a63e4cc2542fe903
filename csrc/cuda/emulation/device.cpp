#include "cuda/emulation/device.h"

#include <stdlib.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <vector>

#include "cuda/calls.h"
#include "cuda/emulation/emulation.h"
#include "cuda/emulation/switch_fiber.h"
#include "cuda/launch.h"

namespace quest {
namespace cuda {
namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr int kLanes = 32;

enum class Waits { kNot, kWarp, kCta, kDone };

struct Copy {
  char* to;
  const char* from;
  int bytes;
  bool is_live;
};

struct Fiber {
  Stack stack;
  Waits waits = Waits::kNot;
  int exchanges = 0;
  std::vector<std::vector<Copy>> groups;  // the last one is not committed yet
};

struct Cta {
  int64_t x = 0, y = 0;
  std::vector<char> shared;
  std::vector<Fiber> fibers = std::vector<Fiber>(kThreads);
  LaneWords words[2][kWarps][kLanes];
};

Settings settings;
Cta* cta = nullptr;
int current = 0;
Stack scheduler;
const std::function<void()>* body = nullptr;
std::mt19937 order;

Fiber& fiber() { return cta->fibers[current]; }

void pause(Waits waits) {
  Fiber& me = fiber();
  me.waits = waits;
  switch_stack(me.stack, scheduler, waits == Waits::kDone);
}

void run_fiber() {
  finish_switch(fiber().stack);
  (*body)();
  pause(Waits::kDone);
}

// Lets every thread of a warp run to a barrier of the CTA or to its end; false: it never gets
// there.
bool run_warp(int warp) {
  int lanes[kLanes];
  std::iota(lanes, lanes + kLanes, warp * kLanes);
  if (settings.seed) std::shuffle(lanes, lanes + kLanes, order);
  for (;;) {
    int count[4] = {0, 0, 0, 0};
    for (int lane : lanes) {
      current = lane;
      if (fiber().waits == Waits::kNot) switch_stack(scheduler, fiber().stack, false);
      ++count[static_cast<int>(fiber().waits)];
    }
    if (count[static_cast<int>(Waits::kWarp)] == 0) return true;
    if (count[static_cast<int>(Waits::kWarp)] < kLanes) return false;
    for (int lane : lanes) cta->fibers[lane].waits = Waits::kNot;
  }
}

bool run_cta() {
  for (Fiber& each : cta->fibers) {
    if (!each.stack.memory) {
      each.stack.size = kStackBytes;
      each.stack.memory = static_cast<char*>(aligned_alloc(64, kStackBytes));
    }
    prepare(each.stack, run_fiber);
    each.waits = Waits::kNot;
    each.exchanges = 0;
    each.groups.assign(1, {});
  }
  int warps[kWarps];
  std::iota(warps, warps + kWarps, 0);
  for (;;) {
    if (settings.seed) std::shuffle(warps, warps + kWarps, order);
    for (int warp : warps) {
      if (!run_warp(warp)) return false;
    }
    const auto is_done = [](const Fiber& each) { return each.waits == Waits::kDone; };
    const auto num_done = std::count_if(cta->fibers.begin(), cta->fibers.end(), is_done);
    if (num_done == kThreads) return true;
    if (num_done > 0) return false;
    for (Fiber& each : cta->fibers) each.waits = Waits::kNot;
  }
}

}  // namespace

Settings& emulation_settings() { return settings; }

int thread_index() { return current; }
int cta_x() { return static_cast<int>(cta->x); }
int cta_y() { return static_cast<int>(cta->y); }
char* shared_memory() { return cta->shared.data(); }

void sync_cta() { pause(Waits::kCta); }
void sync_warp() { pause(Waits::kWarp); }

bool any_in_cta(bool x) {
  static bool votes[kThreads];
  votes[current] = x;
  sync_cta();
  const bool found = std::any_of(votes, votes + kThreads, [](bool vote) { return vote; });
  sync_cta();
  return found;
}

const LaneWords* exchange(const void* mine, int bytes) {
  const int warp = current / kLanes;
  LaneWords* lanes = cta->words[fiber().exchanges++ % 2][warp];
  memcpy(&lanes[current % kLanes], mine, bytes);
  sync_warp();
  return lanes;
}

unsigned ballot(bool x) {
  const LaneWords* lanes = exchange(&x, sizeof(x));
  unsigned bits = 0;
  for (int i = 0; i < kLanes; ++i) {
    bool other;
    memcpy(&other, &lanes[i], sizeof(other));
    bits |= static_cast<unsigned>(other) << i;
  }
  return bits;
}

void copy_async(void* shared, const void* global, bool is_live) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16) abort();
  fiber().groups.back().push_back(
      {static_cast<char*>(shared), static_cast<const char*>(global), 16, is_live});
}

void copy_half_async(void* shared, const void* global) {
  if (reinterpret_cast<uintptr_t>(shared) % 8 || reinterpret_cast<uintptr_t>(global) % 8) abort();
  fiber().groups.back().push_back(
      {static_cast<char*>(shared), static_cast<const char*>(global), 8, true});
}

void commit_copies() { fiber().groups.emplace_back(); }

void wait_for_copies_but(int num_pending) {
  auto& groups = fiber().groups;
  const int num_done = static_cast<int>(groups.size()) - 1 - num_pending;
  for (int i = 0; i < num_done; ++i) {
    for (const Copy& copy : groups[i]) {
      copy.is_live ? memcpy(copy.to, copy.from, copy.bytes) : memset(copy.to, 0, copy.bytes);
    }
  }
  if (num_done > 0) groups.erase(groups.begin(), groups.begin() + num_done);
}

namespace {

uint16_t element(const LaneWords* rows, int matrix, int row, int column) {
  const char* p;
  memcpy(&p, &rows[matrix * 8 + row], sizeof(p));
  uint16_t x;
  memcpy(&x, p + 2 * column, sizeof(x));
  return x;
}

}  // namespace

void load_matrices(const void* row, uint32_t (&x)[4]) {
  if (reinterpret_cast<uintptr_t>(row) % 16) abort();
  const LaneWords* rows = exchange(&row, sizeof(row));
  const int lane = current % kLanes;
  for (int m = 0; m < 4; ++m) {
    x[m] = element(rows, m, lane / 4, lane % 4 * 2) |
           static_cast<uint32_t>(element(rows, m, lane / 4, lane % 4 * 2 + 1)) << 16;
  }
}

void load_transposed(const void* row, uint32_t (&x)[4]) {
  if (reinterpret_cast<uintptr_t>(row) % 16) abort();
  const LaneWords* rows = exchange(&row, sizeof(row));
  const int lane = current % kLanes;
  for (int m = 0; m < 4; ++m) {
    x[m] = element(rows, m, lane % 4 * 2, lane / 4) |
           static_cast<uint32_t>(element(rows, m, lane % 4 * 2 + 1, lane / 4)) << 16;
  }
}

void multiply_matrices_of(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                          float (*widen)(uint16_t)) {
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const LaneWords* lanes = exchange(mine, sizeof(mine));
  const int lane = current % kLanes;
  const auto half = [&](int from, int word, int i) {
    uint32_t words[6];
    memcpy(words, &lanes[from], sizeof(words));
    return widen(static_cast<uint16_t>(words[word] >> 16 * i));
  };
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4, column = lane % 4 * 2 + i % 2;
    double sum = c[i];
    for (int k = 0; k < 16; ++k) {
      // a: words 0, 1 hold k 0 to 7 of rows `row` and row + 8, words 2, 3 the other k.
      const float x = half(row * 4 + k % 8 / 2, k / 8 * 2 + i / 2, k % 2);
      const float y = half(column * 4 + k % 8 / 2, 4 + k / 8, k % 2);
      sum += static_cast<double>(x) * y;
    }
    c[i] = static_cast<float>(sum);
  }
}

void multiply_bits(int32_t (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  const uint32_t mine[3] = {a0, a1, b};
  const LaneWords* lanes = exchange(mine, sizeof(mine));
  const int lane = current % kLanes;
  const auto word = [&](int from, int i) {
    uint32_t words[3];
    memcpy(words, &lanes[from], sizeof(words));
    return words[i];
  };
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 4; ++k) {
      c[i] += __builtin_popcount(word(row * 4 + k, i / 2) & word(column * 4 + k, 2));
    }
  }
}

int run_grid(int64_t grid_x, int64_t grid_y, int64_t bytes, const std::function<void()>& kernel) {
  static Cta the_cta;
  if (bytes > settings.shared_bytes) return 1;
  ++settings.num_launches;
  cta = &the_cta;
  body = &kernel;
  order.seed(settings.seed);
  std::vector<int64_t> ctas(grid_x * grid_y);
  std::iota(ctas.begin(), ctas.end(), 0);
  if (settings.seed) std::shuffle(ctas.begin(), ctas.end(), order);
  for (int64_t i : ctas) {
    cta->x = i % grid_x;
    cta->y = i / grid_x;
    // As much as was asked for, so that a sanitizer sees what is beyond; NaN in every format.
    std::vector<char>().swap(cta->shared);
    cta->shared.assign(bytes, static_cast<char>(0xff));
    if (!run_cta()) return 2;
  }
  return 0;
}

int get_device(int, Device* device) {
  *device = {settings.num_sms, settings.shared_bytes, false};
  return 0;
}

const char* error_text(int error) {
  return error == 1 ? "too much shared memory" : "not all threads reach a barrier";
}

int clear(void* memory, int64_t bytes, void*) {
  memset(memory, 0, bytes);
  return 0;
}

}  // namespace cuda
}  // namespace quest
