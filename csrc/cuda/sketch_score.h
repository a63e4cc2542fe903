// Scores of page sketches: log of the sum of exp over the tokens of a page, their products with the
// query being estimated. A warp brings the rows of some pages to shared memory while it scores
// those before; of every two pages, each lane has one token at a time.
#pragma once

#include "cuda/score.h"
#include "cuda/sketch_channels.h"
#include "cuda/sketch_estimate.h"

namespace quest {
namespace cuda {

inline int64_t sketch_scorer_bytes(const ScoreCall& p) {
  const Summaries& s = p.summaries;
  const int64_t queries = num_weight_rows(p) * SketchQueries<float>::num_words(s.head_dim);
  const int64_t scratch = kWarps * sketch_scratch_floats(s);
  const int64_t slots = kWarps * p.num_stages * p.pages_per_step;
  return (queries + scratch + sketch_channel_floats(s.head_dim)) * 4 +
         slots * sketch_slot_bytes(s) + 256;
}

// One CTA's share of the pages of one (row, KV head). T: of keys and query.
template <class T>
class SketchScorer {
 public:
  static constexpr bool kHasScales = true;
  QUEST_BOTH static int channel_floats(int head_dim) { return sketch_channel_floats(head_dim); }

  QUEST_DEVICE SketchScorer(const ScoreCall& p, int row, int kv_head, SharedMemory& memory)
      : p_(p),
        s_(p.summaries),
        row_(row),
        kv_head_(kv_head),
        estimator_(p.summaries),
        queries_(p, memory.take<uint32_t>(num_weight_rows(p) *
                                          SketchQueries<T>::num_words(p.summaries.head_dim))) {
    batch_row_ = p.rows.q_len > 0 ? row / p.rows.q_len : row;
    scratch_ = memory.take<float>(kWarps * sketch_scratch_floats(s_));
    slot_bytes_ = static_cast<int>(sketch_slot_bytes(s_));
    stage_bytes_ = p.pages_per_step * slot_bytes_;
    stages_ = memory.take<char>(static_cast<int64_t>(kWarps) * p.num_stages * stage_bytes_) +
              warp_index() * p.num_stages * stage_bytes_;
  }

  QUEST_DEVICE void start(const PageRange&) const {}  // summarise() needs the memory

  QUEST_DEVICE void prepare(float* channel_scale) {
    const SketchChannels channels(channel_scale, s_.head_dim);
    const bool is_sum = p_.group_reduce == GroupReduce::kSum;
    const int first = kv_head_ * p_.rows.group_size;
    for (int i = warp_index(); i < num_weight_rows(p_); i += kWarps) {
      queries_.prepare(i, row_, first + i, is_sum ? p_.rows.group_size : 1, channels);
    }
    sync_cta();
  }

  // As in PageScorer.
  template <class PlaceOf>
  QUEST_DEVICE bool run(const PageRange& range, const PlaceOf& place_of, int64_t sample) {
    const bool differs = sample >= 0 && page_differs(sample, range.channel_scale);
    for (int64_t page = range.first + warp_index(); page < range.last; page += kWarps) {
      if (page < range.start || page >= range.num_sealed) continue;
      summarise(page, range.channel_scale);
      if (char* stored = place_of(page)) {
        for (int i = lane_index(); i < s_.rows.row_bytes; i += 32) stored[i] = stages_[i];
      }
      if (range.has_scores) score<1>(range, page, 1, true, stages_);
      sync_warp();
    }
    if (range.has_scores) {
      p_.pages_per_step > 2 ? score_stored_pages<4>(range) : score_stored_pages<1>(range);
    }
    return differs;
  }

  // channel_scale, from the keys.
  QUEST_DEVICE void scale_channels(int64_t num_pages, float* channel_scale, WarpValues& shared) {
    scale_sketch_channels<T>(s_, p_.update, batch_row_, kv_head_, num_pages,
                             SketchChannels(channel_scale, s_.head_dim), scratch_, shared);
  }
  // They are in `channel_scale`.
  QUEST_DEVICE void complete_channels(float* channel_scale) const {
    cuda::complete_channels(s_, SketchChannels(channel_scale, s_.head_dim));
  }

 private:
  // Whether the stored summary of a page is not that of its keys, for a whole warp.
  QUEST_DEVICE bool page_differs(int64_t page, float* channel_scale) {
    summarise(page, channel_scale);
    const char* stored = row_of(s_, batch_row_, kv_head_, page);
    bool differs = false;
    for (int i = lane_index(); i < s_.rows.row_bytes; i += 32) {
      differs = differs || stages_[i] != stored[i];
    }
    differs = ballot(differs) != 0;
    sync_warp();
    return differs;
  }

  // To the first slot.
  QUEST_DEVICE void summarise(int64_t page, float* channel_scale) {
    SketchPage<T> keys(s_, p_.update, batch_row_, kv_head_, page,
                       scratch_ + warp_index() * sketch_scratch_floats(s_));
    keys.read_mean();
    keys.write(SketchChannels(channel_scale, s_.head_dim), stages_);
  }

  // kPairs: pairs of pages at a time.
  template <int kPairs>
  QUEST_DEVICE void score_stored_pages(const PageRange& range) {
    const int per_step = p_.pages_per_step, num_stages = p_.num_stages;
    int64_t ahead = range.first + warp_index() * per_step;
#pragma unroll 1
    for (int i = 0; i < num_stages; ++i) {
      fetch(range, ahead, stages_ + i * stage_bytes_);
      ahead += kWarps * per_step;
    }
    int stage = 0;
#pragma unroll 1
    for (int64_t page = range.first + warp_index() * per_step; page < range.last;
         page += kWarps * per_step) {
      wait_for_oldest(num_stages);
      sync_warp();
      char* rows = stages_ + stage * stage_bytes_;
      const int count = static_cast<int>(minimum<int64_t>(per_step, range.last - page));
      score<kPairs>(range, page, count, false, rows);
      sync_warp();
      fetch(range, ahead, rows);
      ahead += kWarps * per_step;
      stage = stage + 1 == num_stages ? 0 : stage + 1;
    }
    wait_for_copies<0>();
    sync_warp();
  }

  // Copies of the rows of a step begin.
  QUEST_DEVICE void fetch(const PageRange& range, int64_t page, char* rows) {
    const int64_t end = minimum(range.last, range.num_complete);
    const char* from = row_of(s_, batch_row_, kv_head_, page);
#pragma unroll 1
    for (int i = 0; i < p_.pages_per_step && page + i < end; ++i) {
      if (s_.has_aligned_rows) {
        for (int j = lane_index() * 8; j < s_.rows.row_bytes; j += 256) {
          copy_half_async(rows + j, from + j);
        }
      } else {
        for (int j = lane_index(); j < s_.rows.row_bytes; j += 32) rows[j] = from[j];
      }
      rows += slot_bytes_;
      from += s_.rows.page_stride;
    }
    commit_copies();
  }

  // Bit 8 * pair + tile: this lane's token of the tile is attended by one of the heads.
  template <int kPairs>
  QUEST_DEVICE uint32_t find_live(const PageRange& range, int64_t page, int count, int first_head,
                                  int num_heads) const {
    uint32_t live = 0;
    num_heads = p_.rows.mask.head_stride ? num_heads : 1;
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      const int index = 2 * pair + estimator_.second();
      if (index >= count) continue;
#pragma unroll 1
      for (int t = estimator_.token(); t < s_.page_size; t += kSketchTile) {
        const int64_t position = (page + index) * s_.page_size + t;
        bool found = position < range.len;
        if (found && p_.rows.mask.data) {
          found = false;
          for (int h = 0; h < num_heads; ++h) {
            const uint8_t* mask = mask_of(p_.rows, row_, first_head + h);
            found = found || mask[position * p_.rows.mask.token_stride];
          }
        }
        live |= static_cast<uint32_t>(found) << (8 * pair + t / kSketchTile);
      }
    }
    return live;
  }

  // Pages [page, page + count), whose rows are in slots one after the other.
  template <int kPairs>
  QUEST_DEVICE void score(const PageRange& range, int64_t page, int count, bool is_new,
                          const char* rows) {
    const int num_queries = num_weight_rows(p_), group_size = p_.rows.group_size;
    const int head = kv_head_ * group_size;
    const bool is_none = p_.group_reduce == GroupReduce::kNone;
    const bool is_own = is_none && p_.rows.mask.head_stride != 0;
    uint32_t live = find_live<kPairs>(range, page, count, head, is_own ? 1 : group_size);
    float best = -kInfinity;
#pragma unroll 1
    for (int i = 0; i < num_queries; ++i) {
      if (is_own && i > 0) live = find_live<kPairs>(range, page, count, head + i, 1);
      const float score = estimator_.template score<kPairs>(queries_.load(i), rows, count, live);
      // NaN stays the maximum.
      best = score > best || score != score ? score : best;
      if (is_none) write<kPairs>(range, page, count, is_new, live, i, score);
    }
    if (!is_none) write<kPairs>(range, page, count, is_new, live, 0, best);
  }

  // For all lanes of a warp. `select`: of the choices that the group makes.
  template <int kPairs>
  QUEST_DEVICE void write(const PageRange& range, int64_t first, int count, bool is_new,
                          uint32_t live, int select, float score) const {
    const int index = 2 * SketchEstimator::pair_of_result<kPairs>() + estimator_.second();
    const int64_t page = first + index;
    bool is_live = false;
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      const unsigned lanes = ballot((live >> 8 * pair & 0xff) != 0);
      if (pair == SketchEstimator::pair_of_result<kPairs>())
        is_live = (lanes & 0x33333333u << 2 * estimator_.second()) != 0;
    }
    const bool is_sealed = page >= range.start && page < range.num_sealed;
    if (index >= count || (is_sealed && !is_new)) return;
    if ((kPairs == 1 ? estimator_.token() : lane_index() & 5) != 0) return;
    if (page >= range.num_complete) score = -kInfinity;
    if (p_.scores) p_.scores[score_index(p_, row_, kv_head_, select, page)] = score;
    if (range.order) range.order_of_page(select, page) = order_of(score, is_live);
  }

  const ScoreCall& p_;
  const Summaries& s_;
  int row_;
  int kv_head_;
  int batch_row_;
  SketchEstimator estimator_;
  SketchQueries<T> queries_;
  float* scratch_;
  char* stages_;  // of this warp
  int slot_bytes_;
  int stage_bytes_;
};

}  // namespace cuda
}  // namespace quest
