// The best pages within the budget of a row, ascending, without sorting: by a CTA, which finds the
// order of the last page that is chosen digit by digit.
#pragma once

#include "cuda/budget.h"

namespace quest {
namespace cuda {

constexpr int kDigits = 256;

struct SelectMemory {
  WarpValues values;
  int32_t sinks_end;
  int32_t counts[4][kDigits];  // per digit of 32 bits
  // What the warps tell each other, each member once in a choice.
  struct Exchange {
    int32_t forced[kWarps];
    int32_t others[kWarps];
    uint32_t lowest[kWarps];
    uint32_t highest[kWarps];
    int64_t chosen[kWarps];
  } exchange;
};

// Used with top_p below 1, during the search.
struct WeightMemory {
  int64_t weights[kDigits];
  int64_t values[kWarps];
};

// Shared memory for orders.
struct OrderMemory {
  int32_t* words;
  int size;
};

// An order where it is read fast: in `memory`, if that holds it.
QUEST_DEVICE const int32_t* copy_order(const int32_t* order, int num_pages,
                                       const OrderMemory& memory) {
  if (num_pages > memory.size) return order;
#pragma unroll 8
  for (int i = thread_index(); i < num_pages; i += kThreads) memory.words[i] = order[i];
  return memory.words;
}

// Thread i has pages [i * share, (i + 1) * share): what it counts is in their order.
class PageSelector {
 public:
  // order [num_pages], of the pages in use; may be what threads of the CTA have just written.
  QUEST_DEVICE PageSelector(const Selection& selection, const int32_t* order, int num_pages,
                            SelectMemory& memory, WeightMemory& weights)
      : selection_(selection),
        order_(order),
        num_pages_(num_pages),
        memory_(memory),
        weights_(weights) {
    for (int i = 0; i < 4; ++i) memory_.counts[i][thread_index()] = 0;
    sync_cta();
    // Odd: then a warp that reads page i of all shares finds them in different banks.
    const int share = (num_pages + kThreads - 1) / kThreads | 1;
    begin_ = minimum(thread_index() * share, num_pages);
    end_ = minimum(begin_ + share, num_pages);
    first_recent_ = num_pages - static_cast<int>(selection.num_recent_pages);
  }

  // Writes page_indices and returns how many there are.
  QUEST_DEVICE int select(int32_t* page_indices) {
    find_sinks();
    count_pages();
    const int wanted = row_budget(selection_, num_pages_) - num_forced_;
    // Chosen is what is forced, what has an order of lowest_ or above, and num_ties_ of those with
    // the order tie_, from the first on.
    if (selection_.top_p < 1 && num_others_ > 0) {
      const int64_t total = weigh_pages();
      if (total > 0) {
        find_threshold<true>(wanted, share_of(selection_.top_p, total));
      } else {  // shares may all be too small to weigh: none of the others, and none is NaN
        lowest_ = static_cast<uint64_t>(high_) + 1;
        num_ties_ = 0;
      }
    } else if (num_others_ <= wanted) {
      lowest_ = low_;
      num_ties_ = 0;
    } else {
      find_threshold<false>(wanted, 0);
    }
    return write(page_indices);
  }

 private:
  // In the order of the integers, from 0 on.
  QUEST_DEVICE uint32_t rank(int page) const {
    return static_cast<uint32_t>(order_[page]) ^ 0x80000000u;
  }
  QUEST_DEVICE bool is_live(int page) const { return order_[page] != kDeadOrder; }
  QUEST_DEVICE bool is_forced(int page) const { return page < sinks_end_ || page >= first_recent_; }

  // The pages before sinks_end_ that are live are the sinks.
  QUEST_DEVICE void find_sinks() {
    const int num_sinks = static_cast<int>(selection_.num_sink_pages);
    sinks_end_ = minimum(num_sinks, num_pages_);
    bool all_live = true;
#pragma unroll 1
    for (int page = 0; page < sinks_end_; ++page) all_live = all_live && is_live(page);
    if (all_live) return;
    int count = 0, total = 0;
#pragma unroll 1
    for (int page = begin_; page < end_; ++page) count += is_live(page);
    int before = sum_before(count, memory_.values, total);
    if (thread_index() == 0) memory_.sinks_end = num_pages_;
    sync_cta();
    if (before < num_sinks && before + count >= num_sinks) {
      int page = begin_;
#pragma unroll 1
      for (; before < num_sinks; ++page) before += is_live(page);
      memory_.sinks_end = page;
    }
    sync_cta();
    sinks_end_ = memory_.sinks_end;
  }

  QUEST_DEVICE void count_pages() {
    int forced = 0, others = 0;
    uint32_t low = 0xffffffffu, high = 0;
#pragma unroll 1
    for (int page = begin_; page < end_; ++page) {
      if (!is_live(page)) continue;
      if (is_forced(page)) {
        ++forced;
      } else {
        ++others;
        low = minimum(low, rank(page));
        high = maximum(high, rank(page));
      }
    }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      forced += shuffle_xor(forced, lanes);
      others += shuffle_xor(others, lanes);
      low = minimum(low, shuffle_xor(low, lanes));
      high = maximum(high, shuffle_xor(high, lanes));
    }
    SelectMemory::Exchange& all = memory_.exchange;
    if (lane_index() == 0) {
      all.forced[warp_index()] = forced;
      all.others[warp_index()] = others;
      all.lowest[warp_index()] = low;
      all.highest[warp_index()] = high;
    }
    sync_cta();
    low_ = 0xffffffffu;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      num_forced_ += all.forced[w];
      num_others_ += all.others[w];
      low_ = minimum(low_, all.lowest[w]);
      high_ = maximum(high_, all.highest[w]);
    }
  }

  // Returns the sum of the weights of the others.
  QUEST_DEVICE int64_t weigh_pages() {
    uint32_t best = 0;
#pragma unroll 1
    for (int page = begin_; page < end_; ++page) {
      if (!is_live(page) || is_forced(page) || order_[page] == kNaNOrder) continue;
      best = maximum(best, rank(page));
    }
    best_ = static_cast<int32_t>(largest(best, memory_.values) ^ 0x80000000u);
    int64_t sum = 0, total = 0;
#pragma unroll 1
    for (int page = begin_; page < end_; ++page) {
      if (is_live(page) && !is_forced(page)) sum += weight(order_[page]);
    }
    sum_before(sum, weights_.values, total);
    return total;
  }
  QUEST_DEVICE int32_t weight(int32_t order) const { return weight_of(selection_, order, best_); }

  // Of the `wanted` best of the others, which are more: the bits that all have in common are known,
  // the rest is found up to 8 at a time. kHasWeights: of the best that have less than wanted_weight
  // before them, which the weights of all reach, and at most `wanted`.
  template <bool kHasWeights>
  QUEST_DEVICE void find_threshold(int wanted, int64_t wanted_weight) {
    int bits = low_ == high_ ? 0 : 32 - leading_zeros(low_ ^ high_);
    uint64_t prefix = static_cast<uint64_t>(high_) >> bits;
    if (wanted == 0) {
      lowest_ = static_cast<uint64_t>(high_) + 1;
      num_ties_ = 0;
      return;
    }
#pragma unroll 1
    for (int round = 0; bits > 0; ++round) {
      const int width = minimum(bits, 8), size = 1 << width;
      int32_t* counts = memory_.counts[round];
      if (kHasWeights) {
        sync_cta();
        weights_.weights[thread_index()] = 0;
        sync_cta();
      }
#pragma unroll 1
      for (int page = thread_index(); page < num_pages_; page += kThreads) {
        const uint64_t x = rank(page);
        if (!is_live(page) || is_forced(page) || x >> bits != prefix) continue;
        const int digit = static_cast<int>(x >> (bits - width) & (size - 1));
        atomic_add(&counts[digit], 1);
        if (!kHasWeights) continue;
        const int64_t mine = weight(order_[page]);
        if (mine > 0) atomic_add(&weights_.weights[digit], mine);
      }
      sync_cta();
      const Digit last = find_digit<kHasWeights>(counts, wanted, wanted_weight);
      bits -= width;
      prefix = prefix << width | static_cast<uint32_t>(last.digit);
      wanted -= last.above;
      wanted_weight -= last.weight_above;
      if (last.count == (kHasWeights ? 1 : wanted)) {
        lowest_ = prefix << bits;
        num_ties_ = 0;
        return;
      }
    }
    tie_ = prefix;
    lowest_ = prefix + 1;
    num_ties_ = wanted;
    if (kHasWeights) {
      const int64_t each = weight(static_cast<int32_t>(static_cast<uint32_t>(tie_) ^ 0x80000000u));
      if (each > 0) {
        const int64_t enough = (wanted_weight + each - 1) / each;
        num_ties_ = static_cast<int>(minimum<int64_t>(wanted, enough));
      }
    }
  }

  struct Digit {
    int digit;
    int above;  // pages with higher ones
    int count;
    int64_t weight_above;
  };
  // The digit at which the best pages come to `wanted`, or their weights to wanted_weight. Every
  // warp finds it by itself: lane i looks at the digits [248 - 8 * i, 256 - 8 * i).
  template <bool kHasWeights>
  QUEST_DEVICE Digit find_digit(const int32_t* counts, int wanted, int64_t wanted_weight) const {
    constexpr int kEach = kDigits / 32;
    const int first = kDigits - kEach * (lane_index() + 1);
    int32_t mine[kEach];
    int sum = 0;
    int64_t weight_sum = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      mine[i] = counts[first + i];
      sum += mine[i];
      if (kHasWeights) weight_sum += weights_.weights[first + i];
    }
    int above = sum;
    int64_t weight_above = weight_sum;
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      const int other = shuffle_up(above, lanes);
      const int64_t other_weight = kHasWeights ? shuffle_up(weight_above, lanes) : 0;
      if (lane_index() < lanes) continue;
      above += other;
      weight_above += other_weight;
    }
    const bool is_enough = above >= wanted || (kHasWeights && weight_above >= wanted_weight);
    const int lane = lowest_bit(ballot(is_enough));
    above -= sum;
    weight_above -= weight_sum;
    Digit found = {first, above, 0, weight_above};
    bool is_found = false;
#pragma unroll
    for (int i = kEach - 1; i >= 0; --i) {
      const int64_t each = kHasWeights ? weights_.weights[first + i] : 0;
      if (!is_found) found = {first + i, above, mine[i], weight_above};
      above += mine[i];
      weight_above += each;
      is_found = is_found || above >= wanted || (kHasWeights && weight_above >= wanted_weight);
    }
    found.digit = shuffle(found.digit, lane);
    found.above = shuffle(found.above, lane);
    found.count = shuffle(found.count, lane);
    found.weight_above = kHasWeights ? shuffle(found.weight_above, lane) : 0;
    return found;
  }

  QUEST_DEVICE int write(int32_t* page_indices) {
    int chosen = 0, ties = 0;
#pragma unroll 1
    for (int page = begin_; page < end_; ++page) {
      const Kind kind = kind_of(page);
      chosen += kind == Kind::kChosen;
      ties += kind == Kind::kTied;
    }
    // Both at once, ties in the upper half.
    int64_t sum = chosen | static_cast<int64_t>(ties) << 32, total = 0;
    const int64_t mine = sum;
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      const int64_t other = shuffle_up(sum, lanes);
      if (lane_index() >= lanes) sum += other;
    }
    int64_t* all = memory_.exchange.chosen;
    if (lane_index() == 31) all[warp_index()] = sum;
    sync_cta();
    int64_t before = sum - mine;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp_index()) before += all[w];
      total += all[w];
    }
    int tie = static_cast<int>(before >> 32);
    int place = static_cast<int32_t>(before) + minimum(tie, num_ties_);
#pragma unroll 1
    for (int page = begin_; page < end_; ++page) {
      const Kind kind = kind_of(page);
      const bool is_tied = kind == Kind::kTied;
      if (kind == Kind::kChosen || (is_tied && tie < num_ties_)) page_indices[place++] = page;
      tie += is_tied;
    }
    sync_cta();
    return static_cast<int32_t>(total) + minimum(static_cast<int>(total >> 32), num_ties_);
  }

  enum class Kind { kNot, kChosen, kTied };
  QUEST_DEVICE Kind kind_of(int page) const {
    if (!is_live(page)) return Kind::kNot;
    if (is_forced(page) || rank(page) >= lowest_) return Kind::kChosen;
    return num_ties_ > 0 && rank(page) == tie_ ? Kind::kTied : Kind::kNot;
  }

  const Selection& selection_;
  const int32_t* order_;
  int num_pages_;
  SelectMemory& memory_;
  WeightMemory& weights_;
  int begin_;
  int end_;
  int first_recent_;
  int sinks_end_ = 0;
  int num_forced_ = 0;
  int num_others_ = 0;
  uint32_t low_ = 0;  // of the others
  uint32_t high_ = 0;
  uint64_t lowest_ = 0;
  uint64_t tie_ = 0;
  int num_ties_ = 0;
  int32_t best_ = 0;  // order of the others that is a number's
};
static_assert(sizeof(WeightMemory) <= kMaxSharedList * sizeof(int32_t), "it lies in the list");

}  // namespace cuda
}  // namespace quest
