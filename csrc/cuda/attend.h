// Split-KV attention: units, splits, and the merging of partial results. What is summed with what
// depends on the tokens of a work alone (unit_size), so the bits do too.
#pragma once

#include "cuda/attend_work.h"

namespace quest {
namespace cuda {

template <class T, class Warp>
class Attender {
 public:
  QUEST_DEVICE Attender(const AttendCall& p, const Work& work, AttendMemory& shared,
                        SharedMemory& memory)
      : p_(p), work_(work), shared_(shared) {
    query_ = memory.take<char>(Warp::kQueryBytes);
    list_ = memory.take<int32_t>(kMaxSharedList);
    const int64_t partial = static_cast<int64_t>(p.heads_per_tile) * (p.rows.value_dim + 2);
    merging_ = memory.take<float>(Warp::kNumWarps * partial);
    base_ = partial_at(memory.take<float>(partial), p.heads_per_tile, p.rows.value_dim, 0);
    scratch_ = memory.take<char>(Warp::kNumWarps * Warp::kScratchBytes) +
               warp_index() * Warp::kScratchBytes;
    stages_ = memory.take<char>(0);
    stage_ = stages_ + warp_index() * (2 * kTileTokens * Warp::kRowBytes);
  }

  // Finds the tokens of the work and this CTA's share of their units. `order`: what the pages are
  // chosen by, a function of their number and of shared memory [kMaxSharedOrder].
  template <class Order>
  QUEST_DEVICE void find_share(int len, const Order& order) {
    find_tokens(len, order);
    size_ = unit_size(tokens_.num_slots);
    num_units_ = maximum(1, (tokens_.num_slots + size_ - 1) / size_);
    share_ = (num_units_ + p_.num_splits - 1) / p_.num_splits;
    first_ = work_.split * share_;
    last_ = minimum(first_ + share_, num_units_);
  }
  QUEST_DEVICE bool has_share() const { return first_ < num_units_; }
  QUEST_DEVICE int first_unit() const { return first_; }
  // CTAs that have one.
  QUEST_DEVICE int num_active() const { return (num_units_ + share_ - 1) / share_; }

  // Attends the share. The first CTA keeps what it finds, the others leave a partial per unit:
  // that of unit i is number first + i of `partials`.
  QUEST_DEVICE void attend(float* partials, int64_t first) {
    partials_ = partials;
    first_partial_ = first;
    load_query();
    attend_units();
  }

  // Where `partials` are those of all CTAs, in device memory: the CTA that comes last goes on from
  // what the first one has, in the order of the units.
  QUEST_DEVICE void finish() {
    const int count = work_.num_heads * p_.rows.value_dim;
    if (num_active() == 1) {
      for (int i = thread_index(); i < count; i += kThreads) write_out(element(base_, i), i);
      return;
    }
    const Partial start = unit_partial(0);
    if (first_ == 0) {
      for (int i = thread_index(); i < count; i += kThreads) start.values[i] = base_.values[i];
      for (int h = thread_index(); h < work_.num_heads; h += kThreads) {
        start.maxima[h] = base_.maxima[h];
        start.sums[h] = base_.sums[h];
      }
    }
    fence_device();
    sync_cta();
    if (thread_index() == 0) {
      int32_t* arrivals = p_.arrivals + work_.index;
      shared_.is_last = atomic_add(arrivals, 1) == num_active() - 1;
      if (shared_.is_last) *arrivals = 0;
    }
    sync_cta();
    if (!shared_.is_last) return;
    fence_device();
    for (int i = thread_index(); i < count; i += kThreads) {
      fold_units(i, [&](int unit) { return element(unit_partial(unit), i); });
    }
  }

#ifdef QUEST_HAS_CLUSTERS
  // Where each CTA of the work has its partials in shared memory, the first of them on rank
  // `first_rank` of the cluster, and all of them are done: every CTA makes its part of the output.
  QUEST_DEVICE void finish_in_cluster(float* partials, int first_rank) {
    const int value_dim = p_.rows.value_dim, count = work_.num_heads * value_dim;
    const auto element_of = [&](const Partial& partial, int i, int rank) -> Folded {
      return {load_peer(partial.maxima + i / value_dim, rank),
              load_peer(partial.sums + i / value_dim, rank), load_peer(partial.values + i, rank)};
    };
    const int first = (warp_index() * p_.num_splits + work_.split) * 32 + lane_index();
    for (int i = first; i < count; i += p_.num_splits * kThreads) {
      fold_units(i, [&](int unit) {
        if (unit == 0) return element_of(base_, i, first_rank);
        const Partial partial = partial_at(partials, p_.heads_per_tile, value_dim, unit % share_);
        return element_of(partial, i, first_rank + unit / share_);
      });
    }
  }
#endif

 private:
  template <class Order>
  QUEST_DEVICE void find_tokens(int len, const Order& order) {
    tokens_ = {nullptr, p_.choice.page_size, len, len, nullptr, p_.rows.mask.token_stride};
    if (p_.rows.mask.data) tokens_.mask = mask_of(p_.rows, work_.row, work_.first_head);
    const int64_t budget = static_cast<int64_t>(p_.choice.page_budget) * p_.choice.page_size;
    if (p_.attended == Attended::kAll) return;
    if (p_.attended == Attended::kSelected && len <= budget) return;
    const int capacity = p_.attended == Attended::kSelected ? p_.choice.page_budget : p_.num_slots;
    int32_t* list = p_.lists ? p_.lists + static_cast<int64_t>(work_.index) * capacity : list_;
    int count = 0;
    if (p_.attended == Attended::kSelected) {
      const int num_pages = (len + p_.choice.page_size - 1) / p_.choice.page_size;
      PageSelector selector(p_.choice, order(num_pages, reinterpret_cast<int32_t*>(stages_)),
                            num_pages, shared_.select);
      count = selector.select(list);
      tokens_.num_slots = count * p_.choice.page_size;
      // The last page may be cut short by the end of the row.
      if (count > 0) {
        const int end = (list[count - 1] + 1) * p_.choice.page_size;
        tokens_.num_slots -= maximum(0, end - len);
      }
    } else {
      bool is_every_page = false;
      count = read_list(len, list, is_every_page);
      if (is_every_page) return;  // the same bits as kAll
      tokens_.num_slots = count * p_.choice.page_size;
    }
    tokens_.pages = list;
  }

  // The listed pages in use, in the order of the list.
  QUEST_DEVICE int read_list(int len, int32_t* list, bool& is_every_page) {
    const int num_pages = (len + p_.choice.page_size - 1) / p_.choice.page_size;
    const int32_t* slots = p_.page_indices + work_.row * p_.indices_strides[0] +
                           work_.select_head * p_.indices_strides[1];
    int count = 0;
    bool out_of_order = false;
    for (int first = 0; first < p_.num_slots; first += kThreads) {
      const int i = first + thread_index();
      const int32_t page = i < p_.num_slots ? slots[i * p_.indices_strides[2]] : -1;
      const bool is_used = page >= 0 && page < num_pages;
      int total = 0;
      const int place = count + sum_before(is_used, shared_.select.values, total);
      if (is_used) list[place] = page;
      out_of_order = out_of_order || (is_used && page != place);
      count += total;
    }
    is_every_page = !any_in_cta(out_of_order) && count == num_pages;
    return count;
  }

  // Rows of the tile of heads, zeros behind.
  QUEST_DEVICE void load_query() {
    constexpr int kRowElements = Warp::kRowBytes / static_cast<int>(sizeof(T));
    T* rows = reinterpret_cast<T*>(query_);
    for (int i = thread_index(); i < Warp::kHeads * kRowElements; i += kThreads) {
      const int h = i / kRowElements, d = i % kRowElements;
      T x{};
      if (h < work_.num_heads && d < p_.rows.head_dim) {
        x = query_of<T>(p_.query, p_.rows, work_.row, work_.first_head + h)[d];
      }
      rows[i] = x;
    }
    // Behind head_dim rows of keys are never written again. (The order of pages was here.)
    for (int i = thread_index(); i < p_.num_stages * Warp::kNumWarps * 2 * kTileTokens;
         i += kThreads) {
      T* row = reinterpret_cast<T*>(stages_ + i * Warp::kRowBytes);
      for (int d = p_.rows.head_dim; d < minimum(p_.rows.head_dim + 8, kRowElements); ++d) {
        row[d] = T{};
      }
    }
    const int batch_row = work_.row / p_.rows.q_len;
    keys_ = cache_of<T>(p_.key_cache, batch_row, work_.kv_head);
    values_ = cache_of<T>(p_.value_cache, batch_row, work_.kv_head);
    const int elements = work_.num_heads * p_.rows.value_dim;
    for (int i = thread_index(); i < elements; i += kThreads) base_.values[i] = 0;
    for (int h = thread_index(); h < work_.num_heads; h += kThreads) {
      base_.maxima[h] = -kInfinity;
      base_.sums[h] = 0;
    }
    sync_cta();
  }

  // Tile i of a unit is that of warp i % Warp::kNumWarps.
  struct Place {
    int unit;
    int slot;
  };
  static constexpr int kStep = Warp::kNumWarps * kTileTokens;
  QUEST_DEVICE static bool attends() { return warp_index() < Warp::kNumWarps; }
  QUEST_DEVICE int unit_end(int unit) const {
    return minimum((unit + 1) * size_, tokens_.num_slots);
  }
  // This warp's first tile at or behind `place`; unit is last_ if there is none.
  QUEST_DEVICE Place tile_from(Place place) const {
    while (place.unit < last_ && place.slot >= unit_end(place.unit)) {
      ++place.unit;
      place.slot = place.unit * size_ + warp_index() * kTileTokens;
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
    const Place start = {attends() ? first_ : last_, first_ * size_ + warp_index() * kTileTokens};
    Place ahead = tile_from(start), now = ahead;
    // Of the tiles under way, 16 bits each, the next one first.
    uint64_t live = 0;
#pragma unroll 1
    for (int s = 0; s < p_.num_stages; ++s) {
      live |= static_cast<uint64_t>(fetch_next(ahead, s)) << 16 * s;
    }
    int stage = 0;
    for (int unit = first_; unit < last_; ++unit) {
      while (now.unit == unit) {
        wait();
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
      merge(warp, unit, first_ == 0);
      warp.reset();
    }
    wait_for_copies<0>();
  }

  QUEST_DEVICE char* stage_at(int stage) const {
    return stage_ + stage * static_cast<int>(stage_bytes<Warp>());
  }
  QUEST_DEVICE unsigned fetch_next(Place& ahead, int stage) {
    unsigned live = 0;
    if (ahead.unit < last_) {
      live = fetch(ahead, stage_at(stage));
      ahead = tile_from({ahead.unit, ahead.slot + kStep});
    }
    commit_copies();
    return live;
  }
  QUEST_DEVICE void wait() const {
    if (p_.num_stages == 1) {
      wait_for_copies<0>();
    } else if (p_.num_stages == 2) {
      wait_for_copies<1>();
    } else {
      wait_for_copies<2>();  // kMaxStages (plan.cpp) is 3
    }
  }

  // What the warps found in a unit: onto what was before, from the first unit on, or for later.
  QUEST_DEVICE void merge(Warp& warp, int unit, bool is_from_start) {
    const int num_heads = work_.num_heads, value_dim = p_.rows.value_dim;
    const Partial mine = partial_at(merging_, p_.heads_per_tile, value_dim, warp_index());
    if (attends()) warp.write({mine.maxima, mine.sums, mine.values}, num_heads);
    sync_cta();
    const Partial out = is_from_start ? base_ : unit_partial(unit);
    for (int i = thread_index(); i < num_heads * value_dim; i += kThreads) {
      const int head = i / value_dim;
      float maxima[Warp::kNumWarps], top = -kInfinity;
#pragma unroll
      for (int w = 0; w < Warp::kNumWarps; ++w) {
        maxima[w] = partial_at(merging_, p_.heads_per_tile, value_dim, w).maxima[head];
        top = fmaxf(top, maxima[w]);
      }
      const float shift = top == -kInfinity ? 0 : top;
      float sum = 0, value = 0;
#pragma unroll
      for (int w = 0; w < Warp::kNumWarps; ++w) {
        const Partial part = partial_at(merging_, p_.heads_per_tile, value_dim, w);
        const float factor = power_of_2(maxima[w] - shift);
        sum = multiply_add(part.sums[head], factor, sum);
        value = multiply_add(part.values[i], factor, value);
      }
      Folded folded = {top, sum, value};
      if (is_from_start) {
        folded = {base_.maxima[head], base_.sums[head], base_.values[i]};
        folded.add(top, sum, value);
      }
      out.values[i] = folded.value;
      if (!is_from_start && i % value_dim == 0) {
        out.maxima[head] = folded.maximum;
        out.sums[head] = folded.sum;
      }
    }
    sync_cta();
    if (is_from_start) {
      // All have read the maxima and sums before.
      for (int h = thread_index(); h < num_heads; h += kThreads) fold_head(h);
      sync_cta();
    }
  }

  // Maximum and sum of a head, as those of each of its channels above.
  QUEST_DEVICE void fold_head(int head) {
    const int value_dim = p_.rows.value_dim;
    float top = -kInfinity;
    for (int w = 0; w < Warp::kNumWarps; ++w) {
      top = fmaxf(top, partial_at(merging_, p_.heads_per_tile, value_dim, w).maxima[head]);
    }
    const float shift = top == -kInfinity ? 0 : top;
    float sum = 0;
    for (int w = 0; w < Warp::kNumWarps; ++w) {
      const Partial part = partial_at(merging_, p_.heads_per_tile, value_dim, w);
      sum = multiply_add(part.sums[head], power_of_2(part.maxima[head] - shift), sum);
    }
    Folded folded = {base_.maxima[head], base_.sums[head], 0};
    folded.add(top, sum, 0);
    base_.maxima[head] = folded.maximum;
    base_.sums[head] = folded.sum;
  }

  QUEST_DEVICE Partial unit_partial(int unit) const {
    return partial_at(partials_, p_.heads_per_tile, p_.rows.value_dim, first_partial_ + unit);
  }

  // Of channel i % value_dim of head i / value_dim.
  QUEST_DEVICE Folded element(const Partial& partial, int i) const {
    const int head = i / p_.rows.value_dim;
    return {partial.maxima[head], partial.sums[head], partial.values[i]};
  }

  // part(unit): such an element of a unit; of unit 0: of all units of the first CTA.
  template <class Part>
  QUEST_DEVICE void fold_units(int i, const Part& part) {
    Folded folded = part(0);
#pragma unroll 4
    for (int unit = share_; unit < num_units_; ++unit) {
      const Folded next = part(unit);
      folded.add(next.maximum, next.sum, next.value);
    }
    write_out(folded, i);
  }

  QUEST_DEVICE void write_out(const Folded& folded, int i) {
    const int value_dim = p_.rows.value_dim, head = i / value_dim;
    const int64_t index = static_cast<int64_t>(work_.row) * p_.rows.num_q_heads + work_.first_head;
    const float inverse = folded.sum == 0 ? 0 : divide(1, folded.sum);
    from_float(multiply(folded.value, inverse), static_cast<T*>(p_.out)[index * value_dim + i]);
    if (p_.lse && i % value_dim == 0) {
      constexpr float kLn2 = 0.693147180559945f;
      p_.lse[index + head] = folded.sum == 0
                                 ? -kInfinity
                                 : multiply_add(folded.maximum, kLn2, natural_log(folded.sum));
    }
  }

  const AttendCall& p_;
  const Work work_;
  AttendMemory& shared_;
  char* query_;
  int32_t* list_;
  float* merging_;  // a partial per warp
  Partial base_;    // from the first unit on
  char* scratch_;   // of this warp
  char* stages_;
  char* stage_;  // this warp's part of the first
  Tokens tokens_;
  const T* keys_;
  const T* values_;
  int size_;       // tokens of a unit
  int num_units_;  // of the work
  int share_;      // that a CTA has, at most
  int first_;      // this one's
  int last_;
  float* partials_;
  int64_t first_partial_;
};

}  // namespace cuda
}  // namespace quest
