// What a write to the cache means for page summaries, and what is known of them from before.
#pragma once

#include "cuda/cta.h"

namespace quest {
namespace cuda {

// What a write means for the pages.
struct Span {
  int first;       // position written
  int end;         // last position written + 1
  int num_sealed;  // complete pages
  int start;       // pages before this one keep their summaries, unless somebody else wrote
};

// For all threads of the CTA. Positions outside of the cache count as its ends. `start` is 0.
QUEST_DEVICE Span read_positions(const Update& u, const Summaries& s, WarpValues& shared) {
  uint32_t top = 0, bottom = 0;  // bottom: of the complements, so that both are maxima
  const bool is_one = u.num_positions == 1;
#pragma unroll 1
  for (int64_t i = is_one ? 0 : thread_index(); i < u.num_positions; i += kThreads) {
    const int64_t x = u.positions[i * u.position_stride];
    const int64_t last = u.max_seq_len - 1;
    const uint32_t position = static_cast<uint32_t>(x < 0 ? 0 : x < last ? x : last);
    top = maximum(top, position);
    bottom = maximum(bottom, ~position);
  }
  if (!is_one) {
    bottom = largest(bottom, shared);
    top = largest(top, shared);
  }
  Span span;
  span.first = static_cast<int>(~bottom);
  span.end = static_cast<int>(top) + 1;
  span.num_sealed = span.end / s.page_size;
  span.start = 0;
  return span;
}

// The state before this step. Read first: what is waited for together takes no longer.
struct State {
  int64_t next_position;  // -1: not known
  int64_t num_sealed;
};
QUEST_DEVICE State read_state(const Update& u) {
  const int64_t num_sealed = *u.num_sealed;
  return {u.next_position ? *u.next_position : -1, num_sealed};
}

// What of the state is still valid.
QUEST_DEVICE int read_start(const State& state, const Summaries& s, const Span& span) {
  if (state.next_position >= 0 && state.next_position != span.first) return 0;
  const int64_t sealed = maximum<int64_t>(state.num_sealed, 0);
  return static_cast<int>(minimum<int64_t>(sealed, span.first / s.page_size));
}

QUEST_DEVICE void store_state(const Update& u, const Span& span) {
  int64_t* next = u.next_position;
  *u.num_sealed = span.num_sealed;
  if (next && *next >= 0) *next = span.end;
}

// The pages that are looked at for changes made by others: sample i of those before `start`.
QUEST_DEVICE int sample_of(const Span& span, int start, int i) {
  if (i == 0) return start - 1;
  const uint32_t spread = static_cast<uint32_t>(span.first) * 2654435761u, n = start;
  return static_cast<int>((spread % n + static_cast<uint32_t>(i - 1) * 40503) % n);
}

// The first sample that is this page; kNumSamples: none is.
QUEST_DEVICE int sample_index(const Span& span, int start, int page) {
  int i = 0;
  while (i < kNumSamples && sample_of(span, start, i) != page) ++i;
  return i;
}

}  // namespace cuda
}  // namespace quest
