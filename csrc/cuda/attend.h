// Split-KV attention: units and splits. What is summed with what depends on the tokens of a work
// alone (unit_size), so the bits do too.
#pragma once

#include "cuda/attend_merge.h"
#include "cuda/attend_tokens.h"

namespace quest {
namespace cuda {

template <class T, class Warp>
class Attender {
 public:
  QUEST_DEVICE Attender(const AttendCall& p, const Work& work, AttendMemory& shared,
                        SharedMemory& memory)
      : p_(p),
        work_(work),
        shared_(shared),
        query_(memory.take<char>(Warp::kQueryBytes)),
        list_(memory.take<int32_t>(kMaxSharedList)),
        merger_(p, work, memory) {
    scratch_ = memory.take<char>(Warp::kNumWarps * Warp::kScratchBytes) +
               warp_index() * Warp::kScratchBytes;
    stages_ = memory.take<char>(0);
    stage_ = stages_ + warp_index() * (2 * kTileTokens * Warp::kRowBytes);
  }

  // Copies of the rows of the tile of heads begin, with zeros behind; before attend().
  QUEST_DEVICE void load_query() {
    constexpr int kPerVector = 16 / static_cast<int>(sizeof(T)), kVectors = Warp::kRowBytes / 16;
#pragma unroll 1
    for (int i = thread_index(); i < Warp::kHeads * kVectors; i += kThreads) {
      const int h = i / kVectors, d = i % kVectors * kPerVector;
      T* to = reinterpret_cast<T*>(query_ + i * 16);
      if (h >= work_.num_heads || d >= p_.rows.head_dim) {
        *reinterpret_cast<Vector*>(to) = {{0, 0, 0, 0}};
        continue;
      }
      const T* from = query_of<T>(p_.query, p_.rows, work_.row, work_.first_head + h) + d;
      if (reinterpret_cast<uintptr_t>(from) % 16 == 0) {
        copy_async(to, from, true);
      } else {
#pragma unroll 1
        for (int j = 0; j < kPerVector; ++j) to[j] = from[j];
      }
    }
    commit_copies();
    const int batch_row = work_.row / p_.rows.q_len;
    keys_ = cache_of<T>(p_.key_cache, batch_row, work_.kv_head);
    values_ = cache_of<T>(p_.value_cache, batch_row, work_.kv_head);
  }

  // Finds the tokens of the work and this CTA's share of their units.
  QUEST_DEVICE void find_share(int len) {
    // Nothing is attended yet.
    const int order_size = maximum<int>(p_.num_stages * stage_bytes<Warp>() / 4, kMaxSharedOrder);
    const ListMemory memory = {
        shared_.select, list_, {reinterpret_cast<int32_t*>(stages_), order_size}};
    tokens_ = find_tokens(p_, work_, len, memory);
    units_.size = unit_size(tokens_.num_slots);
    units_.num_units = maximum(1, (tokens_.num_slots + units_.size - 1) / units_.size);
    units_.share = (units_.num_units + p_.num_splits - 1) / p_.num_splits;
    units_.first = work_.split * units_.share;
    units_.last = minimum(units_.first + units_.share, units_.num_units);
  }
  QUEST_DEVICE bool has_share() const { return units_.first < units_.num_units; }
  QUEST_DEVICE int first_unit() const { return units_.first; }

  // Attends the share. The first CTA keeps what it finds, the others leave a partial per unit:
  // that of unit i is number first + i of `partials`.
  QUEST_DEVICE void attend(float* partials, int64_t first) {
    clear_ends();
    merger_.start(partials, first);
    wait_for_copies<0>();  // of the query
    sync_cta();
    attend_units();
  }

  // As in UnitMerger.
  QUEST_DEVICE void finish() { merger_.finish(units_, shared_.is_last); }

 private:
  // Behind head_dim rows of keys are never written again. (The order of pages was here.)
  QUEST_DEVICE void clear_ends() {
    constexpr int kPerVector = 16 / static_cast<int>(sizeof(T));
    const int first = p_.rows.head_dim / kPerVector, last = Warp::kMaxDim / kPerVector;
    if (first == last) return;
#pragma unroll 1
    for (int row = thread_index(); row < p_.num_stages * Warp::kNumWarps * 2 * kTileTokens;
         row += kThreads) {
#pragma unroll 1
      for (int v = first; v < last; ++v) {
        *reinterpret_cast<Vector*>(stages_ + row * Warp::kRowBytes + v * 16) = {{0, 0, 0, 0}};
      }
    }
  }

  // Tile i of a unit is that of warp i % Warp::kNumWarps.
  struct Place {
    int unit;
    int slot;
  };
  static constexpr int kStep = Warp::kNumWarps * kTileTokens;
  QUEST_DEVICE static bool attends() { return warp_index() < Warp::kNumWarps; }
  QUEST_DEVICE int unit_end(int unit) const {
    return minimum((unit + 1) * units_.size, tokens_.num_slots);
  }
  // This warp's first tile at or behind `place`; unit is units_.last if there is none.
  QUEST_DEVICE Place tile_from(Place place) const {
    while (place.unit < units_.last && place.slot >= unit_end(place.unit)) {
      ++place.unit;
      place.slot = place.unit * units_.size + warp_index() * kTileTokens;
    }
    return place;
  }

  // Copies of the keys and values of a tile begin, and of its mask, to what is unused of the first
  // row; returns which of its tokens are there.
  QUEST_DEVICE unsigned fetch(const Place& place, char* keys) {
    char* values = keys + kTileTokens * Warp::kRowBytes;
    char* mask = keys + Warp::kRowBytes - 16;
    unsigned there = 0;
    // Half a tile is part of one page: page sizes are multiples of 8.
#pragma unroll 1
    for (int first = 0; first < kTileTokens; first += kTileTokens / 2) {
      const int slot = place.slot + first, left = unit_end(place.unit) - slot;
      const int position = left > 0 ? tokens_.position(slot) : 0;
      const int count = minimum(kTileTokens / 2, minimum(left, tokens_.len - position));
      if (count > 0) there |= ((1u << count) - 1) << first;
      const int offset = first * Warp::kRowBytes;
      fetch_rows(keys_, p_.key_cache.token_stride, p_.rows.head_dim, position, count,
                 keys + offset);
      fetch_rows(values_, p_.value_cache.token_stride, p_.rows.value_dim, position, count,
                 values + offset);
      if (tokens_.mask && count > 0) fetch_mask(position, count, mask + first);
    }
    return there;
  }

  QUEST_DEVICE void fetch_rows(const T* cache, int64_t stride, int dim, int position, int count,
                               char* rows) {
    constexpr int kPerVector = 16 / static_cast<int>(sizeof(T));
    constexpr int kRowVectors = (Warp::kRowBytes - 16) / 16;
    constexpr int kLanes = kRowVectors < 32 ? kRowVectors : 32;
    const int token = lane_index() / kLanes, v = lane_index() % kLanes;
    const T* from = cache + (position + token) * stride + v * kPerVector;
    char* to = rows + token * Warp::kRowBytes + v * 16;
    if (p_.has_aligned_caches) {
#pragma unroll
      for (int first = 0; first < kTileTokens / 2; first += 32 / kLanes) {
        const bool is_there = first + token < count;
#pragma unroll
        for (int i = 0; i < kRowVectors / kLanes; ++i) {
          if ((v + i * kLanes) * kPerVector >= dim) break;
          copy_async(to + i * kLanes * 16, is_there ? from + i * kLanes * kPerVector : cache,
                     is_there);
        }
        from += 32 / kLanes * stride;
        to += 32 / kLanes * Warp::kRowBytes;
      }
      return;
    }
#pragma unroll 1
    for (int i = lane_index(); i < kTileTokens / 2 * dim; i += 32) {
      const int row = i / dim, d = i % dim;
      reinterpret_cast<T*>(rows + row * Warp::kRowBytes)[d] =
          row < count ? cache[(position + row) * stride + d] : T{};
    }
  }

  QUEST_DEVICE void fetch_mask(int position, int count, char* to) {
    const uint8_t* from = tokens_.mask + position * tokens_.mask_stride;
    const int lane = lane_index();
    if (count == 8 && tokens_.mask_stride == 1 && reinterpret_cast<uintptr_t>(from) % 8 == 0) {
      if (lane == 0) copy_half_async(to, from);
    } else if (lane < count) {
      to[lane] = static_cast<char>(from[lane * tokens_.mask_stride]);
    }
  }

  // Which of the tokens that are there are attended. Values of the others become zeros: they may be
  // NaN, which no weight of 0 takes away.
  QUEST_DEVICE unsigned apply_mask(unsigned there, char* keys) const {
    if (!tokens_.mask || there == 0) return there;
    const int lane = lane_index();
    const unsigned live = ballot(lane < kTileTokens && (keys + Warp::kRowBytes - 16)[lane]) & there;
    char* values = keys + kTileTokens * Warp::kRowBytes;
    if (live != there) {
#pragma unroll 1
      for (int i = lane; i < kTileTokens * (Warp::kRowBytes / 16); i += 32) {
        const int row = i / (Warp::kRowBytes / 16);
        if (!(live >> row & 1)) *reinterpret_cast<Vector*>(values + i * 16) = {{0, 0, 0, 0}};
      }
      sync_warp();
    }
    return live;
  }

  QUEST_DEVICE void attend_units() {
    Warp warp(query_, scratch_, p_.rows.head_dim, p_.rows.value_dim, p_.scale_log2);
    const Place start = {attends() ? units_.first : units_.last,
                         units_.first * units_.size + warp_index() * kTileTokens};
    Place ahead = tile_from(start), now = ahead;
    // Tokens that are there, of the tiles under way: 16 bits each, the next one first.
    uint64_t there = 0;
#pragma unroll 1
    for (int s = 0; s < p_.num_stages; ++s) {
      there |= static_cast<uint64_t>(fetch_next(ahead, s)) << 16 * s;
    }
    int stage = 0;
    for (int unit = units_.first; unit < units_.last; ++unit) {
      while (now.unit == unit) {
        wait_for_oldest(p_.num_stages);
        sync_warp();
        char* keys = stage_at(stage);
        const unsigned live = apply_mask(there & 0xffffu, keys);
        if (live) warp.attend(keys, keys + kTileTokens * Warp::kRowBytes, live, work_.num_heads);
        sync_warp();
        const uint64_t fetched = fetch_next(ahead, stage);
        there = there >> 16 | fetched << 16 * (p_.num_stages - 1);
        stage = stage + 1 == p_.num_stages ? 0 : stage + 1;
        now = tile_from({now.unit, now.slot + kStep});
      }
      merger_.merge(warp, unit, units_.first == 0);
      warp.reset();
    }
    wait_for_copies<0>();
  }

  QUEST_DEVICE char* stage_at(int stage) const {
    return stage_ + stage * static_cast<int>(stage_bytes<Warp>());
  }
  QUEST_DEVICE unsigned fetch_next(Place& ahead, int stage) {
    unsigned there = 0;
    if (ahead.unit < units_.last) {
      there = fetch(ahead, stage_at(stage));
      ahead = tile_from({ahead.unit, ahead.slot + kStep});
    }
    commit_copies();
    return there;
  }

  const AttendCall& p_;
  const Work& work_;
  AttendMemory& shared_;
  char* query_;
  int32_t* list_;
  UnitMerger<T, Warp> merger_;
  char* scratch_;  // of this warp
  char* stages_;
  char* stage_;  // this warp's part of the first
  Tokens tokens_;
  const T* keys_;
  const T* values_;
  UnitShare units_;
};

}  // namespace cuda
}  // namespace quest
