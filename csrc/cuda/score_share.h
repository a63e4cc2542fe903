// One CTA's share of the summaries and scores of a (row, KV head), whatever is kept of the pages.
#pragma once

#include "cuda/budget.h"
#include "cuda/sketch_score.h"

namespace quest {
namespace cuda {

// What there is to do for a row, known to the device alone.
struct RowPages {
  bool updates;
  bool has_scores;
  Span span;
  int len;
  int num_pages;  // to summarise or to score
  int share;      // that every CTA gets: a multiple of 4
};

QUEST_DEVICE RowPages find_pages(const ScoreCall& p, int row, WarpValues& values) {
  const Summaries& s = p.summaries;
  RowPages pages = {};
  pages.updates = p.update.positions != nullptr;
  const int64_t seq_len = p.query.data ? given_len(p.rows, row / p.rows.q_len) : 0;
  if (pages.updates) {
    const State state = read_state(p.update);
    pages.span = read_positions(p.update, s, values);
    pages.span.start = read_start(state, s, pages.span);
  }
  pages.num_pages = pages.span.num_sealed;
  if (p.query.data) {
    pages.len = row_len(p.rows, row, seq_len, values);
    pages.has_scores = !fits_budget(p.choice, pages.len);
  }
  if (pages.has_scores) {
    const int num_used = (pages.len + s.page_size - 1) / s.page_size;
    pages.num_pages = maximum(pages.num_pages, p.scores ? s.num_pages : num_used);
  }
  pages.share = ((pages.num_pages + p.num_parts - 1) / p.num_parts + 3) / 4 * 4;
  return pages;
}

template <class Scorer>
class ShareScorer {
 public:
  QUEST_DEVICE ShareScorer(const ScoreCall& p, const RowPages& pages, int row, int kv_head,
                           int part, SharedMemory& memory, WarpValues& values)
      : p_(p),
        pages_(pages),
        row_(row),
        batch_row_(row / p.rows.q_len),
        kv_head_(kv_head),
        values_(values),
        channel_scale_(memory.take<float>(Scorer::channel_floats(p.summaries.head_dim))),
        scorer_(p, row, kv_head, memory) {
    range_ = {};
    range_.first = part * pages.share;
    range_.last = minimum(range_.first + pages.share, pages.num_pages);
    range_.has_scores = pages.has_scores;
    range_.num_complete = pages.has_scores ? pages.len / p.summaries.page_size : 0;
    range_.start = pages.span.start;
    range_.num_sealed = pages.span.num_sealed;
    range_.len = pages.len;
  }

  QUEST_DEVICE int first_page() const { return range_.first; }
  // As in PageRange.
  QUEST_DEVICE void set_order(int32_t* order, int64_t stride) {
    range_.order = order;
    range_.order_stride = stride;
  }

  // Before the first run. `stores_scale`: this CTA writes new scales where the state is known to be
  // void, so that no CTA reads the old ones.
  QUEST_DEVICE void prepare(bool stores_scale) {
    if (range_.has_scores) scorer_.start(range_);
    if constexpr (Scorer::kHasScales) {
      range_.channel_scale = channel_scale_;
      if (pages_.updates && range_.start == 0 && num_scaled() > 0) {
        scorer_.scale_channels(num_scaled(), channel_scale_, values_);
        if (stores_scale) store_scale(stored_scale());
      } else {
#pragma unroll 1
        for (int d = thread_index(); d < num_scales(); d += kThreads) {
          channel_scale_[d] = stored_scale()[d];
        }
        scorer_.complete_channels(channel_scale_);
      }
    }
    if (range_.has_scores) scorer_.prepare(range_.channel_scale);
  }

  // As in PageScorer. The sample: of the pages that keep their summaries, each warp's own, if the
  // state says that there are any.
  template <class PlaceOf>
  QUEST_DEVICE bool run(const PlaceOf& place_of) {
    const int start = pages_.span.start, i = warp_index();
    const bool looks = pages_.updates && range_.start > 0 && i < kNumSamples;
    return scorer_.run(range_, place_of, looks ? sample_of(pages_.span, start, i) : -1);
  }

  QUEST_DEVICE char* row_of_page(int64_t page) const {
    return row_of(p_.summaries, batch_row_, kv_head_, page);
  }

  // What comes after a foreign write was found: run() then begins with the first page.
  QUEST_DEVICE void start_again() {
    range_.start = 0;
    if (range_.has_scores) scorer_.start(range_);
    if constexpr (Scorer::kHasScales) {
      scorer_.scale_channels(num_scaled(), channel_scale_, values_);
      if (range_.has_scores) scorer_.prepare(channel_scale_);
    }
  }

  QUEST_DEVICE void store_scale(float* stored) const {
#pragma unroll 1
    for (int d = thread_index(); d < num_scales(); d += kThreads) stored[d] = channel_scale_[d];
  }
  QUEST_DEVICE float* stored_scale() const {
    return channel_scale_of(p_.summaries, batch_row_, kv_head_);
  }

 private:
  QUEST_DEVICE int num_scales() const {
    return Scorer::kHasScales ? static_cast<int>(p_.summaries.rows.scale_size) : 0;
  }
  QUEST_DEVICE int64_t num_scaled() const { return floor_to_power_of_two(pages_.span.num_sealed); }

  const ScoreCall& p_;
  const RowPages& pages_;
  int row_;
  int batch_row_;
  int kv_head_;
  WarpValues& values_;
  float* channel_scale_;
  Scorer scorer_;
  PageRange range_;
};

}  // namespace cuda
}  // namespace quest
