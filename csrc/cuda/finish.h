// What kernel 1 leaves to the kernel that comes next.
#pragma once

#include "cuda/summary_rows.h"

namespace quest {
namespace cuda {

// Writes what kernel 1 left to be written for a (batch row, KV head), by a whole CTA.
QUEST_DEVICE void finish_head(const Summaries& s, const Update& u, int batch_row, int kv_head,
                              WarpValues& values) {
  const int64_t head = static_cast<int64_t>(batch_row) * s.num_kv_heads + kv_head;
  const int start = u.stale_starts[head];
  if (start == 0) return;
  const Span span = read_positions(u, s, values);
  if (warp_index() >= kNumSamples) return;
  const int page = sample_of(span, start, warp_index());
  if (sample_index(span, start, page) < warp_index()) return;
  const char* row = late_row(s, u, head, warp_index());
  store_row(s, row, row_of(s, batch_row, kv_head, page));
}

// Of the whole update, by one CTA.
QUEST_DEVICE void finish_update(const FinishCall& p, WarpValues& values) {
  const Span span = read_positions(p.update, p.summaries, values);
  if (thread_index() == 0) store_state(p.update, span);
}

}  // namespace cuda
}  // namespace quest
