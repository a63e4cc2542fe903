// The best pages within the budget of a row, ascending, without sorting: by a CTA, which finds the
// order of the last page that is chosen digit by digit.
#pragma once

#include "cuda/budget.h"

namespace quest {
namespace cuda {

struct SelectMemory {
  WarpValues values;
  int32_t counts[256];
  int32_t found[4];
};

// Used with top_p below 1, during the search.
struct WeightMemory {
  int64_t weights[256];
  int64_t values[kWarps];
  int64_t above;
};

// An order where it is read fast: in `copy` [kMaxSharedOrder], shared memory, if that holds it.
QUEST_DEVICE const int32_t* copy_order(const int32_t* order, int num_pages, int32_t* copy) {
  if (num_pages > kMaxSharedOrder) return order;
  for (int i = thread_index(); i < num_pages; i += kThreads) copy[i] = order[i];
  return copy;
}

// Thread i has pages [i * share, (i + 1) * share): what it counts is in their order.
// kHasTopP: choice.top_p may be below 1.
template <bool kHasTopP>
class PageSelector {
 public:
  // order [num_pages], of the pages in use; may be what threads of the CTA have just written.
  QUEST_DEVICE PageSelector(const Choice& choice, const int32_t* order, int num_pages,
                            SelectMemory& memory, WeightMemory& weights)
      : choice_(choice), order_(order), num_pages_(num_pages), memory_(memory), weights_(weights) {
    sync_cta();
    const int share = (num_pages + kThreads - 1) / kThreads;
    begin_ = minimum(thread_index() * share, num_pages);
    end_ = minimum(begin_ + share, num_pages);
    first_recent_ = num_pages - choice.num_recent_pages;
  }

  // Writes page_indices and returns how many there are.
  QUEST_DEVICE int select(int32_t* page_indices) {
    find_sinks();
    count_pages();
    const int wanted = row_budget(choice_, num_pages_) - num_forced_;
    // Chosen is what is forced, what has an order of lowest_ or above, and num_ties_ of those with
    // the order tie_, from the first on.
    if (kHasTopP && choice_.top_p < 1 && num_others_ > 0) {
      find_threshold<true>(wanted, share_of(choice_.top_p, weigh_pages()));
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
    const int num_sinks = choice_.num_sink_pages;
    int count = 0, total = 0;
    for (int page = begin_; page < end_; ++page) count += is_live(page);
    int before = sum_before(count, memory_.values, total);
    if (thread_index() == 0) memory_.found[0] = num_sinks == 0 ? 0 : num_pages_;
    sync_cta();
    if (before < num_sinks && before + count >= num_sinks) {
      int page = begin_;
      for (; before < num_sinks; ++page) before += is_live(page);
      memory_.found[0] = page;
    }
    sync_cta();
    sinks_end_ = memory_.found[0];
  }

  QUEST_DEVICE void count_pages() {
    int forced = 0, others = 0;
    uint32_t low = 0xffffffffu, high = 0;
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
    sum_before(forced, memory_.values, num_forced_);
    sum_before(others, memory_.values, num_others_);
    low_ = ~largest(~low, memory_.values);
    high_ = largest(high, memory_.values);
  }

  // Returns the sum of the weights of the others.
  QUEST_DEVICE int64_t weigh_pages() {
    uint32_t best = 0;
    for (int page = begin_; page < end_; ++page) {
      if (!is_live(page) || is_forced(page) || order_[page] == kNaNOrder) continue;
      best = maximum(best, rank(page));
    }
    best_ = static_cast<int32_t>(largest(best, memory_.values) ^ 0x80000000u);
    int64_t sum = 0, total = 0;
    for (int page = begin_; page < end_; ++page) {
      if (is_live(page) && !is_forced(page)) sum += weight(order_[page]);
    }
    sum_before(sum, weights_.values, total);
    return total;
  }
  QUEST_DEVICE int32_t weight(int32_t order) const {
    return weight_of(order, best_, choice_.log2_scale);
  }

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
    while (bits > 0) {
      const int width = minimum(bits, 8), size = 1 << width;
      memory_.counts[thread_index()] = 0;
      if (kHasWeights) weights_.weights[thread_index()] = 0;
      sync_cta();
      for (int page = thread_index(); page < num_pages_; page += kThreads) {
        const uint64_t x = rank(page);
        if (!is_live(page) || is_forced(page) || x >> bits != prefix) continue;
        const int digit = static_cast<int>(x >> (bits - width) & (size - 1));
        atomic_add(&memory_.counts[digit], 1);
        if (!kHasWeights) continue;
        const int64_t mine = weight(order_[page]);
        if (mine > 0) atomic_add(&weights_.weights[digit], mine);
      }
      sync_cta();
      // Thread i looks at digit size - 1 - i.
      const int digit = size - 1 - thread_index();
      const int count = digit >= 0 ? memory_.counts[digit] : 0;
      int total = 0;
      const int above = sum_before(count, memory_.values, total);
      bool is_last = above < wanted && above + count >= wanted;
      int64_t weight_above = 0;
      if (kHasWeights) {
        const int64_t mine = digit >= 0 ? weights_.weights[digit] : 0;
        int64_t total_weight = 0;
        weight_above = sum_before(mine, weights_.values, total_weight);
        is_last = above < wanted && weight_above < wanted_weight &&
                  (above + count >= wanted || weight_above + mine >= wanted_weight);
      }
      if (is_last) {
        memory_.found[1] = digit;
        memory_.found[2] = above;
        memory_.found[3] = count;
        if (kHasWeights) weights_.above = weight_above;
      }
      sync_cta();
      bits -= width;
      prefix = prefix << width | static_cast<uint32_t>(memory_.found[1]);
      wanted -= memory_.found[2];
      if (kHasWeights) wanted_weight -= weights_.above;
      const bool is_whole = memory_.found[3] == (kHasWeights ? 1 : wanted);
      sync_cta();
      if (is_whole) {
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

  QUEST_DEVICE int write(int32_t* page_indices) {
    int chosen = 0, ties = 0, num_chosen = 0, num_tied = 0;
    for (int page = begin_; page < end_; ++page) {
      const Kind kind = kind_of(page);
      chosen += kind == Kind::kChosen;
      ties += kind == Kind::kTied;
    }
    int place = sum_before(chosen, memory_.values, num_chosen);
    int tie = sum_before(ties, memory_.values, num_tied);
    place += minimum(tie, num_ties_);
    for (int page = begin_; page < end_; ++page) {
      const Kind kind = kind_of(page);
      const bool is_tied = kind == Kind::kTied;
      if (kind == Kind::kChosen || (is_tied && tie < num_ties_)) page_indices[place++] = page;
      tie += is_tied;
    }
    sync_cta();
    return num_chosen + minimum(num_tied, num_ties_);
  }

  enum class Kind { kNot, kChosen, kTied };
  QUEST_DEVICE Kind kind_of(int page) const {
    if (!is_live(page)) return Kind::kNot;
    if (is_forced(page) || rank(page) >= lowest_) return Kind::kChosen;
    return num_ties_ > 0 && rank(page) == tie_ ? Kind::kTied : Kind::kNot;
  }

  const Choice& choice_;
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
