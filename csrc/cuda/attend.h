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
        for (int j = 0; j < kPerVector; ++j) to[j] = from[j];
      }
    }
    commit_copies();
    const int batch_row = work_.row / p_.rows.q_len;
    keys_ = cache_of<T>(p_.key_cache, batch_row, work_.kv_head);
    values_ = cache_of<T>(p_.value_cache, batch_row, work_.kv_head);
  }

  // Finds the tokens of the work and this CTA's share of their units. `order`: what the pages are
  // chosen by, a function of their number and of shared memory [kMaxSharedOrder]. kHasTopP: as in
  // PageSelector.
  template <bool kHasTopP, class Order>
  QUEST_DEVICE void find_share(int len, const Order& order) {
    const ListMemory memory = {shared_.select, list_, reinterpret_cast<int32_t*>(stages_)};
    tokens_ = find_tokens<kHasTopP>(p_, work_, len, memory, order);
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
#ifdef QUEST_HAS_CLUSTERS
  QUEST_DEVICE void finish_in_cluster(float* partials, int first_rank) {
    merger_.finish_in_cluster(units_, partials, first_rank);
  }
#endif

 private:
  // Behind head_dim rows of keys are never written again. (The order of pages was here.)
  QUEST_DEVICE void clear_ends() {
    constexpr int kRowElements = Warp::kRowBytes / static_cast<int>(sizeof(T));
    for (int i = thread_index(); i < p_.num_stages * Warp::kNumWarps * 2 * kTileTokens;
         i += kThreads) {
      T* row = reinterpret_cast<T*>(stages_ + i * Warp::kRowBytes);
      for (int d = p_.rows.head_dim; d < minimum(p_.rows.head_dim + 8, kRowElements); ++d) {
        row[d] = T{};
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

  // Copies of the keys and values of a tile begin; returns which of its tokens are live.
  QUEST_DEVICE unsigned fetch(const Place& place, char* keys) {
    const int lane = lane_index(), slot = place.slot + lane % kTileTokens;
    int position = 0;
    bool is_live = false;
    if (slot < unit_end(place.unit)) {
      position = tokens_.position(slot);
      is_live = tokens_.is_live(position);
    }
    const unsigned live = ballot(is_live) & 0xffffu;
    if (live == 0) return 0;
    char* values = keys + kTileTokens * Warp::kRowBytes;
    fetch_rows(keys_, p_.key_cache.token_stride, p_.rows.head_dim, position, live, keys);
    fetch_rows(values_, p_.value_cache.token_stride, p_.rows.value_dim, position, live, values);
    return live;
  }

  QUEST_DEVICE void fetch_rows(const T* cache, int64_t stride, int dim, int position, unsigned live,
                               char* rows) {
    constexpr int kPerVector = 16 / static_cast<int>(sizeof(T));
    constexpr int kRowVectors = (Warp::kRowBytes - 16) / 16;
    constexpr int kLanes = kRowVectors < 32 ? kRowVectors : 32;
#pragma unroll
    for (int first = 0; first < kTileTokens; first += 32 / kLanes) {
      const int token = first + lane_index() / kLanes;
      const int64_t start = shuffle(position, token) * stride;
      const bool is_live = live >> token & 1;
#pragma unroll
      for (int i = 0; i < kRowVectors / kLanes; ++i) {
        const int v = lane_index() % kLanes + i * kLanes;
        if (v * kPerVector >= dim) break;
        const T* from = is_live ? cache + start + v * kPerVector : cache;
        char* to = rows + token * Warp::kRowBytes + v * 16;
        if (p_.has_aligned_caches) {
          copy_async(to, from, is_live);
        } else {
          for (int j = 0; j < kPerVector; ++j) {
            reinterpret_cast<T*>(to)[j] = is_live ? from[j] : T{};
          }
        }
      }
    }
  }

  QUEST_DEVICE void attend_units() {
    Warp warp(query_, scratch_, p_.rows.head_dim, p_.rows.value_dim, p_.scale_log2);
    const Place start = {attends() ? units_.first : units_.last,
                         units_.first * units_.size + warp_index() * kTileTokens};
    Place ahead = tile_from(start), now = ahead;
    // Of the tiles under way, 16 bits each, the next one first.
    uint64_t live = 0;
#pragma unroll 1
    for (int s = 0; s < p_.num_stages; ++s) {
      live |= static_cast<uint64_t>(fetch_next(ahead, s)) << 16 * s;
    }
    int stage = 0;
    for (int unit = units_.first; unit < units_.last; ++unit) {
      while (now.unit == unit) {
        wait_for_oldest(p_.num_stages);
        sync_warp();
        char* keys = stage_at(stage);
        const unsigned mine = live & 0xffffu;
        if (mine) {
          warp.attend(keys, keys + kTileTokens * Warp::kRowBytes, mine, work_.num_heads);
        }
        sync_warp();
        const uint64_t fetched = fetch_next(ahead, stage);
        live = live >> 16 | fetched << 16 * (p_.num_stages - 1);
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
    unsigned live = 0;
    if (ahead.unit < units_.last) {
      live = fetch(ahead, stage_at(stage));
      ahead = tile_from({ahead.unit, ahead.slot + kStep});
    }
    commit_copies();
    return live;
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
