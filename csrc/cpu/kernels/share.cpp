// What pages have of each head's softmax over their scores, summed over the heads. Sums have 16
// parts at every level.
#include "cpu/kernels/vec.h"
#include "params.h"

namespace quest {
namespace QUEST_ISA {
namespace {

constexpr int kStep = 16;  // pages
constexpr int kVectors = kStep / kWidth;
typedef int32_t Ints __attribute__((vector_size(4 * kWidth)));
typedef float Floats __attribute__((vector_size(4 * kWidth)));

QUEST_INLINE Floats floats(V x) { return bit_cast<Floats>(x.v); }
QUEST_INLINE V vector(Floats x) { return {bit_cast<decltype(V::v)>(x)}; }

struct Head {
  const float* scores;
  float log2_scale;
  float best = -kInfinity;  // logit
  float inverse = 0;        // of the sum of weights

  QUEST_INLINE Floats logits(const float* some) const {
    const Floats score = floats(load(some));
    return score == -kInfinity ? score : score * log2_scale;
  }
  // exp2(logit - best); 0: does not count.
  QUEST_INLINE Floats weights(const float* some) const {
    const Floats logit = logits(some), zeros = {};
    const Floats distance = logit == best ? zeros : logit - best;
    return floats(load(some)) == -kInfinity ? zeros : floats(exp2(vector(distance)));
  }
};

// Calls visit(first page, scores [kStep] of them); those behind the last one are -inf.
template <class Visit>
QUEST_INLINE void visit_pages(const float* scores, int64_t num_pages, const Visit& visit) {
  int64_t page = 0;
  for (; page + kStep <= num_pages; page += kStep) visit(page, scores + page);
  if (page == num_pages) return;
  float rest[kStep];
  for (int i = 0; i < kStep; ++i) rest[i] = page + i < num_pages ? scores[page + i] : -kInfinity;
  visit(page, rest);
}

template <class Join>
float join_parts(const Floats* parts, const Join& join) {
  float all[kStep];
  memcpy(all, parts, sizeof(all));
  for (int size = kStep / 2; size > 0; size /= 2) {
    for (int i = 0; i < size; ++i) all[i] = join(all[i], all[i + size]);
  }
  return all[0];
}

Head find_head(const ShareParams& p, int h) {
  Head head = {p.scores + h * p.scores_stride, p.log2_scale};
  Floats tops[kVectors], sums[kVectors] = {};
  for (Floats& top : tops) top = floats(set1(-kInfinity));
  visit_pages(head.scores, p.num_pages, [&](int64_t, const float* some) {
    for (int v = 0; v < kVectors; ++v) {
      const Floats logits = head.logits(some + v * kWidth);
      tops[v] = logits > tops[v] ? logits : tops[v];  // NaN is not
    }
  });
  head.best = join_parts(tops, [](float a, float b) { return a > b ? a : b; });
  visit_pages(head.scores, p.num_pages, [&](int64_t, const float* some) {
    for (int v = 0; v < kVectors; ++v) {
      const Floats weights = head.weights(some + v * kWidth), zeros = {};
      sums[v] += weights == weights ? weights : zeros;
    }
  });
  const float sum = join_parts(sums, [](float a, float b) { return a + b; });
  head.inverse = sum > 0 ? 1 / sum : 0;
  return head;
}

}  // namespace

void share_scores(const ShareParams& p) {
  for (int h = 0; h < p.group_size; ++h) {
    const Head head = find_head(p, h);
    visit_pages(head.scores, p.num_pages, [&](int64_t page, const float* some) {
      float shares[kStep];
      const int64_t rest = p.num_pages - page;
      const int64_t bytes = (rest < kStep ? rest : kStep) * sizeof(float);
      if (h > 0) memcpy(shares, p.shares + page, bytes);
      for (int v = 0; v < kVectors; ++v) {
        Floats before = floats(set1(-kInfinity));
        if (h > 0) before = floats(load(shares + v * kWidth));
        const Floats share = head.weights(some + v * kWidth) * head.inverse;
        const Floats sum = before == -kInfinity ? share : before + share;
        const Ints counts = floats(load(some + v * kWidth)) != -kInfinity;
        store(shares + v * kWidth, vector(counts ? sum : before));
      }
      memcpy(p.shares + page, shares, bytes);
    });
  }
}

}  // namespace QUEST_ISA
}  // namespace quest
