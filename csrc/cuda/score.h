// Kernel 1's share of a CTA, whatever is kept of the pages: summaries of pages that were completed,
// and scores.
#pragma once

#include "cuda/score_step.h"

namespace quest {
namespace cuda {

// Rows in shared memory are 4 banks apart from a multiple of 16.
QUEST_BOTH int slot_bytes(const Summaries& s) { return static_cast<int>(s.rows.row_bytes) + 16; }
// Of pages that a warp scores at a time: rows and part of the mask.
QUEST_BOTH int step_bytes(const ScoreCall& p) {
  const int mask_bytes = (p.pages_per_step * p.summaries.page_size + 15) / 16 * 16;
  return p.pages_per_step * slot_bytes(p.summaries) + mask_bytes;
}
// Kind: MinMax or Sketch.
template <class Kind>
QUEST_BOTH int64_t scorer_bytes(const ScoreCall& p) {
  return Kind::shared_bytes(p) + static_cast<int64_t>(kWarps) * p.num_stages * step_bytes(p) + 256;
}

// Code is small on purpose: a step runs it once, and what it takes to fetch instructions was
// measured to be the time of a kernel.
template <class Kind>
class PageScorer {
 public:
  QUEST_DEVICE PageScorer(const ScoreCall& p, int row, int kv_head, SharedMemory& memory)
      : p_(p),
        s_(p.summaries),
        kind_(p, row, kv_head, memory),
        slot_(slot_bytes(p.summaries)),
        step_bytes_(step_bytes(p)) {
    stages_ = memory.take<char>(static_cast<int64_t>(kWarps) * p.num_stages * step_bytes_) +
              warp_index() * p.num_stages * step_bytes_;
    rows_ = row_of(s_, row / p.rows.q_len, kv_head, 0);
    row_stride_ = s_.rows.page_stride * s_.rows.element_size;
    const int64_t group = static_cast<int64_t>(row) * s_.num_kv_heads + kv_head;
    first_score_ = group * num_page_scores(p) * s_.num_pages;
    mask_ = p.rows.mask.data ? mask_of(p.rows, row, kv_head * p.rows.group_size) : nullptr;
  }

  // Makes and scores the pages of the range; new summaries go where place_of(page) says, which may
  // be nowhere. Before that, whether `sample` has another summary than its keys say, if it is not
  // -1. For the whole CTA; is_first: the query is not prepared yet.
  template <class PlaceOf>
  QUEST_DEVICE bool run(const PageRange& range, const PlaceOf& place_of, int sample,
                        bool is_first) {
    const int num_stages = p_.num_stages, per_step = p_.pages_per_step;
    const int first = range.first + warp_index() * per_step;
    bool differs = false;
    int stage = 0;
    // Rows of the first pages begin to come in; then, as a step of its own, the query is prepared
    // and the sample is made. So each of these is in the code once.
#pragma unroll 1
    for (int round = 1 - num_stages, page = first; round <= 0 || page < range.last; ++round) {
      char* slots = stages_ + stage * step_bytes_;
      if (round == 0 && range.has_scores && is_first) {
        kind_.prepare();
        sync_cta();
      }
      if (round > 0 && range.has_scores) {
        wait_for_oldest(num_stages);
        sync_warp();
      }
      int made = 0, last = 0;
      if (round == 0 && sample >= 0) {
        made = sample;
        last = sample + 1;
      } else if (round > 0) {
        made = maximum(page, range.start);
        last = minimum(page + per_step, minimum(range.last, range.num_sealed));
      }
#pragma unroll 1
      for (; made < last; ++made) {
        char* row = round == 0 ? slots : slots + (made - page) * slot_;
        kind_.make_row(made, row);
        if (round == 0) {
          differs = row_differs(s_, row, row_at(made));
        } else if (char* stored = place_of(made)) {
          store_row(s_, row, stored);
        }
        sync_warp();
      }
      if (range.has_scores) {
        if (round > 0) {
          kind_.score(
              Step{p_, range, first_score_, mask_, page, slots, slot_, mask_of_step(slots)});
          sync_warp();
        }
        fetch(range, first + (round + num_stages - 1) * kWarps * per_step, slots);
      }
      if (round > 0) page += kWarps * per_step;
      stage = stage + 1 == num_stages ? 0 : stage + 1;
    }
    if (range.has_scores) wait_for_copies<0>();
    sync_warp();
    return differs;
  }

 private:
  QUEST_DEVICE const char* row_at(int page) const { return rows_ + page * row_stride_; }
  QUEST_DEVICE char* mask_of_step(char* slots) const { return slots + p_.pages_per_step * slot_; }

  // Copies of the stored rows of the pages of a step begin, and of their mask.
  QUEST_DEVICE void fetch(const PageRange& range, int first, char* slots) const {
    const int num_bytes = static_cast<int>(s_.rows.row_bytes);
    const int width = lanes_for(num_bytes / 16), lane = lane_index() % width;
    const int count = minimum(p_.pages_per_step, minimum(range.last, range.num_complete) - first);
#pragma unroll 1
    for (int i = lane_index() / width; i < count; i += 32 / width) {
      const int page = first + i;
      if (page >= range.start && page < range.num_sealed) continue;
      const char* from = row_at(page);
      char* to = slots + i * slot_;
      if (s_.has_aligned_rows) {
#pragma unroll 1
        for (int j = lane * 16; j < num_bytes; j += width * 16) copy_async(to + j, from + j, true);
      } else {
#pragma unroll 1
        for (int j = lane; j < num_bytes; j += width) to[j] = from[j];
      }
    }
    if (mask_ && !p_.rows.mask.head_stride) fetch_mask(range, first, mask_of_step(slots));
    commit_copies();
  }

  QUEST_DEVICE void fetch_mask(const PageRange& range, int first, char* to) const {
    const int begin = first * s_.page_size;
    const int count = minimum(p_.pages_per_step * s_.page_size,
                              minimum(range.last * s_.page_size, range.len) - begin);
    const int64_t stride = p_.rows.mask.token_stride;
    const uint8_t* mask = mask_ + begin * stride;
    const bool is_aligned = stride == 1 && reinterpret_cast<uintptr_t>(mask) % 16 == 0;
#pragma unroll 1
    for (int i = lane_index() * 16; i < count; i += 32 * 16) {
      if (is_aligned && begin + i + 16 <= p_.rows.max_seq_len) {
        copy_async(to + i, mask + i, true);
      } else {
#pragma unroll 1
        for (int j = i; j < minimum(i + 16, count); ++j)
          to[j] = static_cast<char>(mask[j * stride]);
      }
    }
  }

  const ScoreCall& p_;
  const Summaries& s_;
  Kind kind_;
  int slot_;
  int step_bytes_;
  char* stages_;  // of this warp: [num_stages, step_bytes]
  const char* rows_;
  int64_t row_stride_;  // bytes
  int64_t first_score_;
  const uint8_t* mask_;
};

}  // namespace cuda
}  // namespace quest
