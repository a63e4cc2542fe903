// Partial results of units, and how they become the output of a work.
#pragma once

#include "cuda/attend_work.h"

namespace quest {
namespace cuda {

// Of one CTA of a work.
template <class T, class Warp>
class UnitMerger {
 public:
  QUEST_DEVICE UnitMerger(const AttendCall& p, const Work& work, SharedMemory& memory)
      : p_(p), work_(work) {
    const int64_t partial = static_cast<int64_t>(p.heads_per_tile) * (p.rows.value_dim + 2);
    merging_ = memory.take<float>(Warp::kNumWarps * partial);
    base_ = partial_at(memory.take<float>(partial), p.heads_per_tile, p.rows.value_dim, 0);
    next_ = partial_at(memory.take<float>(2 * p.heads_per_tile), p.heads_per_tile, 0, 0);
  }

  // Before the first unit. The partial of unit i is number first + i of `partials`.
  QUEST_DEVICE void start(float* partials, int64_t first) {
    partials_ = partials;
    first_partial_ = first;
#pragma unroll 1
    for (int i = thread_index(); i < num_elements(); i += kThreads) base_.values[i] = 0;
#pragma unroll 1
    for (int h = thread_index(); h < work_.num_heads; h += kThreads) {
      base_.maxima[h] = -kInfinity;
      base_.sums[h] = 0;
    }
  }

  // What the warps found in a unit: onto what was before, from the first unit on, or for later.
  QUEST_DEVICE void merge(Warp& warp, int unit, bool is_from_start) {
    const int num_heads = work_.num_heads, value_dim = p_.rows.value_dim;
    const Partial mine = partial_at(merging_, p_.heads_per_tile, value_dim, warp_index());
    if (warp_index() < Warp::kNumWarps)
      warp.write({mine.maxima, mine.sums, mine.values}, num_heads);
    sync_cta();
    const Partial out = is_from_start ? base_ : unit_partial(unit);
    constexpr int kDim = Warp::kMaxDim;
#pragma unroll 1
    for (int i = thread_index(); i < num_heads * kDim; i += kThreads) {
      const int head = i / kDim, channel = i % kDim, place = head * value_dim + channel;
      if (channel >= value_dim) continue;
      const Partial part = partial_at(merging_, p_.heads_per_tile, value_dim, 0);
      const int step = p_.heads_per_tile * (value_dim + 2);
      float maxima[Warp::kNumWarps], top = -kInfinity;
#pragma unroll
      for (int w = 0; w < Warp::kNumWarps; ++w) {
        maxima[w] = part.maxima[w * step + head];
        top = fmaxf(top, maxima[w]);
      }
      const float shift = top == -kInfinity ? 0 : top;
      float sum = 0, value = 0;
#pragma unroll
      for (int w = 0; w < Warp::kNumWarps; ++w) {
        const float factor = power_of_2(maxima[w] - shift);
        sum = multiply_add(part.sums[w * step + head], factor, sum);
        value = multiply_add(part.values[w * step + place], factor, value);
      }
      Folded folded = {top, sum, value};
      if (is_from_start) {
        folded = {base_.maxima[head], base_.sums[head], base_.values[place]};
        folded.add(top, sum, value);
      }
      out.values[place] = folded.value;
      // Of what is from the start, the others still read what was before.
      if (channel == 0) (is_from_start ? next_ : out).set(head, folded);
    }
    sync_cta();
    if (is_from_start) {
      const Partial before = base_;
      base_.maxima = next_.maxima;
      base_.sums = next_.sums;
      next_.maxima = before.maxima;
      next_.sums = before.sums;
    }
  }

  // Where partials are those of all CTAs, in device memory: the CTA that comes last goes on from
  // what the first one has, in the order of the units. is_last: in shared memory.
  QUEST_DEVICE void finish(const UnitShare& units, int32_t& is_last) {
    const int count = num_elements();
    if (units.num_active() == 1) {
#pragma unroll 1
      for (int i = thread_index(); i < count; i += kThreads) write_out(element(base_, i), i);
      return;
    }
    const Partial start = unit_partial(0);
    if (units.first == 0) {
#pragma unroll 1
      for (int i = thread_index(); i < count; i += kThreads) start.values[i] = base_.values[i];
#pragma unroll 1
      for (int h = thread_index(); h < work_.num_heads; h += kThreads) {
        start.maxima[h] = base_.maxima[h];
        start.sums[h] = base_.sums[h];
      }
    }
    fence_device();
    sync_cta();
    if (thread_index() == 0) {
      int32_t* arrivals = p_.arrivals + work_.index;
      is_last = atomic_add(arrivals, 1) == units.num_active() - 1;
      if (is_last) *arrivals = 0;
    }
    sync_cta();
    if (!is_last) return;
    fence_device();
#pragma unroll 1
    for (int i = thread_index(); i < count; i += kThreads) {
      fold_units(units, i, [&](int unit) { return element(unit_partial(unit), i); });
    }
  }

 private:
  QUEST_DEVICE int num_elements() const { return work_.num_heads * p_.rows.value_dim; }

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
  QUEST_DEVICE void fold_units(const UnitShare& units, int i, const Part& part) {
    Folded folded = part(0);
#pragma unroll 8
    for (int unit = units.share; unit < units.num_units; ++unit) {
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
  const Work& work_;
  float* merging_;  // a partial per warp
  Partial base_;    // from the first unit on
  Partial next_;    // its maxima and sums to be
  float* partials_;
  int64_t first_partial_;
};

}  // namespace cuda
}  // namespace quest
