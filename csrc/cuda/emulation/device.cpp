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
constexpr int kNumWaits = 4;

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
  finish_switch(fiber().stack, scheduler);
  (*body)();
  pause(Waits::kDone);
}

// Lets every thread of a warp run to a barrier of the CTA, or to its end; false: it
// never gets there.
bool run_warp(int warp) {
  int lanes[kLanes];
  std::iota(lanes, lanes + kLanes, warp * kLanes);
  if (settings.seed) std::shuffle(lanes, lanes + kLanes, order);
  for (;;) {
    int count[kNumWaits] = {};
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

void release(Cta& each) {
  for (Fiber& fiber : each.fibers) fiber.waits = Waits::kNot;
}

void begin(Cta& each, int64_t x, int64_t y, int64_t shared_bytes) {
  each.x = x;
  each.y = y;
  // As much as was asked for, so that a sanitizer sees what is beyond; NaN in every format.
  std::vector<char>().swap(each.shared);
  each.shared.assign(shared_bytes, static_cast<char>(0xff));
  for (Fiber& fiber : each.fibers) {
    if (!fiber.stack.memory) {
      fiber.stack.size = kStackBytes;
      fiber.stack.memory = static_cast<char*>(aligned_alloc(64, kStackBytes));
    }
    prepare(fiber.stack, run_fiber);
    fiber.exchanges = 0;
    fiber.groups.assign(1, {});
  }
  release(each);
}

// Lets a CTA run to its end; false: not all threads get to a barrier.
bool run_cta() {
  int warps[kWarps];
  std::iota(warps, warps + kWarps, 0);
  for (;;) {
    if (settings.seed) std::shuffle(warps, warps + kWarps, order);
    for (int warp : warps) {
      if (!run_warp(warp)) return false;
    }
    const Waits waits = cta->fibers[0].waits;
    for (const Fiber& each : cta->fibers) {
      if (each.waits != waits) return false;
    }
    if (waits == Waits::kDone) return true;
    release(*cta);
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

int run_grid(int64_t grid_x, int64_t grid_y, int64_t bytes, const std::function<void()>& kernel) {
  static Cta only;
  if (bytes > settings.shared_bytes) return 1;
  ++settings.num_launches;
  body = &kernel;
  order.seed(settings.seed);
  scheduler = {};
  cta = &only;
  std::vector<int64_t> ctas(grid_x * grid_y);
  std::iota(ctas.begin(), ctas.end(), 0);
  if (settings.seed) std::shuffle(ctas.begin(), ctas.end(), order);
  for (int64_t i : ctas) {
    begin(only, i % grid_x, i / grid_x, bytes);
    if (!run_cta()) return 2;
  }
  return 0;
}

int get_device(int, Device* device) {
  *device = {0, settings.num_sms, settings.shared_bytes, true};
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
