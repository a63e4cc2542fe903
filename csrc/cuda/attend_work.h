// What attention is divided into: works, their tokens, and partial results of units of those.
#pragma once

#include "cuda/attend_warp.h"
#include "cuda/select.h"

namespace quest {
namespace cuda {

// A state of the softmax of one head and channel.
struct Folded {
  float maximum;
  float sum;
  float value;

  QUEST_DEVICE void add(float other_maximum, float other_sum, float other_value) {
    const float top = fmaxf(maximum, other_maximum);
    const float shift = top == -kInfinity ? 0 : top;
    const float mine = power_of_2(maximum - shift), theirs = power_of_2(other_maximum - shift);
    sum = multiply_add(sum, mine, multiply(other_sum, theirs));
    value = multiply_add(value, mine, multiply(other_value, theirs));
    maximum = top;
  }
};

// Of one unit or of all before some unit: maxima [heads], sums [heads], values [heads, value_dim].
struct Partial {
  float* maxima;
  float* sums;
  float* values;

  QUEST_DEVICE void set(int head, const Folded& folded) const {
    maxima[head] = folded.maximum;
    sums[head] = folded.sum;
  }
};

QUEST_DEVICE Partial partial_at(float* memory, int num_heads, int value_dim, int64_t index) {
  float* p = memory + index * num_heads * (value_dim + 2);
  return {p, p + num_heads, p + 2 * num_heads};
}

struct AttendMemory {
  SelectMemory select;
  int32_t is_last;
};

template <class Warp>
QUEST_BOTH int64_t stage_bytes() {
  return Warp::kNumWarps * 2ll * kTileTokens * Warp::kRowBytes;
}

// Shared memory: AttendMemory, query, list, merging space, base, then the stages, where the order
// of the pages is kept as long as nothing is attended.
template <class Warp>
QUEST_BOTH int64_t attend_shared_bytes(const AttendCall& p) {
  const int64_t heads = p.heads_per_tile, value_dim = p.rows.value_dim;
  const int64_t partial = heads * (value_dim + 2) * 4 + 16;
  int64_t in_stages = p.num_stages * stage_bytes<Warp>();
  if (p.attended == Attended::kSelected && in_stages < kMaxSharedOrder * 4) {
    in_stages = kMaxSharedOrder * 4;
  }
  return sizeof(AttendMemory) + 16 + Warp::kQueryBytes + kMaxSharedList * 4 +
         Warp::kNumWarps * (partial + Warp::kScratchBytes) + partial + heads * 8 + in_stages + 256;
}

// The positions of a work: the slots of its list of pages, or all below len.
struct Tokens {
  const int32_t* pages;  // nullptr: slot i is position i
  int page_size;
  int num_slots;
  int len;
  const uint8_t* mask;  // nullptr: all
  int64_t mask_stride;

  QUEST_DEVICE int position(int slot) const {
    return pages ? pages[slot / page_size] * page_size + slot % page_size : slot;
  }
};

// Which work a CTA has a share of: `split` of its shares.
struct Work {
  int index;
  int split;
  int row;
  int select_head;  // within the row
  int first_head;   // of the tile
  int num_heads;
  int kv_head;
};

// Which units of a work a CTA has.
struct UnitShare {
  int size;       // tokens of a unit
  int num_units;  // of the work
  int share;      // that a CTA has, at most
  int first;      // this one's
  int last;

  // CTAs that have one.
  QUEST_DEVICE int num_active() const { return (num_units + share - 1) / share; }
};

QUEST_DEVICE Work work_of(const AttendCall& p, int index, int split) {
  Work w;
  w.index = index;
  w.split = split;
  const int tile = index % p.tiles_per_select, select = index / p.tiles_per_select;
  const int num_selects = p.rows.num_kv_heads * p.selects_per_group;
  w.row = select / num_selects;
  w.select_head = select % num_selects;
  w.first_head = w.select_head * p.heads_per_select + tile * p.heads_per_tile;
  w.num_heads = minimum(p.heads_per_tile, p.heads_per_select - tile * p.heads_per_tile);
  w.kv_head = w.select_head / p.selects_per_group;
  return w;
}

}  // namespace cuda
}  // namespace quest
