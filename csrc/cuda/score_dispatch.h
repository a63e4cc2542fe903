// The instances of kernel 1 of one dtype.
#pragma once

#include "cuda/launch.h"
#include "cuda/score_kernel.h"

namespace quest {
namespace cuda {

template <class Scorer>
int launch_scorer(const ScoreCall& p, int64_t bytes, void* stream) {
  const int64_t grid = static_cast<int64_t>(p.rows.batch) * p.rows.q_len * p.summaries.num_kv_heads;
  return launch(score_kernel<Scorer>, grid, p.num_parts, kThreads, bytes, p, stream);
}

template <class T>
int launch_score_of(const ScoreCall& p, void* stream) {
  if (p.summaries.rows.format.kind == SummaryKind::kSketch) {
    return launch_scorer<SketchScorer<T>>(p, sketch_scorer_bytes(p), stream);
  }
  return launch_scorer<PageScorer<T>>(p, page_scorer_bytes(p), stream);
}

int launch_score_float32(const ScoreCall& p, void* stream);
int launch_score_bfloat16(const ScoreCall& p, void* stream);
int launch_score_float16(const ScoreCall& p, void* stream);

}  // namespace cuda
}  // namespace quest
