// The instances of kernel 1.
#pragma once

#include "cuda/launch.h"
#include "cuda/minmax.h"
#include "cuda/score_kernel.h"
#include "cuda/sketch.h"

namespace quest {
namespace cuda {

// Calls f with a pointer to the Kind of the summaries. T: of keys and query.
template <class T, class F>
auto visit_kind(const Summaries& s, const F& f) {
  switch (s.rows.format.kind) {
    case SummaryKind::kMinMax:
      return f(static_cast<MinMax<T>*>(nullptr));
    case SummaryKind::kSketch:
      break;
  }
  return f(static_cast<Sketch<T>*>(nullptr));
}

template <class T>
struct ScoreInstances {
  static int launch(const ScoreCall& p, void* stream);

  static int64_t bytes(const ScoreCall& p) {
    return visit_kind<T>(p.summaries, [&](auto* kind) {
      return scorer_bytes<std::remove_pointer_t<decltype(kind)>>(p);
    });
  }
  static int pages_per_step(const Summaries& s) {
    return visit_kind<T>(
        s, [&](auto* kind) { return std::remove_pointer_t<decltype(kind)>::pages_per_step(s); });
  }
};

// One file per dtype instantiates it.
template <class T>
int ScoreInstances<T>::launch(const ScoreCall& p, void* stream) {
  const int64_t grid = static_cast<int64_t>(p.rows.batch) * p.rows.q_len * p.summaries.num_kv_heads;
  return visit_kind<T>(p.summaries, [&](auto* kind) {
    using Kind = std::remove_pointer_t<decltype(kind)>;
    return cuda::launch(score_kernel<Kind>, grid, p.num_parts, kThreads, bytes(p), p, stream);
  });
}

extern template int ScoreInstances<float>::launch(const ScoreCall& p, void* stream);
extern template int ScoreInstances<BFloat16>::launch(const ScoreCall& p, void* stream);
extern template int ScoreInstances<Float16>::launch(const ScoreCall& p, void* stream);

}  // namespace cuda
}  // namespace quest
