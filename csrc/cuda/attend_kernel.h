// Kernel 2: choice of pages, attention, and what kernel 1 left to be written.
#pragma once

#include "cuda/attend.h"
#include "cuda/finish.h"

namespace quest {
namespace cuda {

// Kernel 2 (calls.h). Grid: work, split.
template <class T, class Warp>
QUEST_KERNEL(kThreads, 1)
attend_kernel(QUEST_PARAM AttendCall p) {
  SharedMemory memory;
  AttendMemory& shared = *memory.take<AttendMemory>(1);
  const Work work = work_of(p, cta_x(), cta_y());
  Attender<T, Warp> attender(p, work, shared, memory);
  attender.load_query();
  const int len = row_len(p.rows, work.row, shared.select.values);
  wait_for_previous();
  attender.find_share(len);
  if (attender.has_share()) {
    attender.attend(p.partials, static_cast<int64_t>(work.index) * p.max_units);
    attender.finish();
  }
  wait_for_copies<0>();
  if (!p.finish.update.positions || cta_y() > 0) return;
  // One CTA of each (batch row, KV head).
  sync_cta();
  const int head = work.kv_head * p.rows.group_size;
  if (work.row % p.rows.q_len == 0 && work.first_head == head) {
    finish_head(p.finish.summaries, p.finish.update, work.row / p.rows.q_len, work.kv_head,
                shared.select.values);
  }
  if (cta_x() == 0) finish_update(p.finish, shared.select.values);
}

}  // namespace cuda
}  // namespace quest
