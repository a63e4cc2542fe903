// The instances of kernel 1 of one dtype.
#pragma once

#include "cuda/launch.h"
#include "cuda/score.h"

namespace quest {
namespace cuda {

template <class T>
int launch_score_of(const ScoreCall& p, void* stream) {
  const int64_t grid = static_cast<int64_t>(p.rows.batch) * p.rows.q_len * p.summaries.num_kv_heads;
  return p.summaries.rows.format.kind == SummaryKind::kMinMaxInt8
             ? launch(score_kernel<T, Int8>, grid, p.num_parts, kThreads, score_shared_bytes(p), p,
                      stream)
             : launch(score_kernel<T, T>, grid, p.num_parts, kThreads, score_shared_bytes(p), p,
                      stream);
}

template <class T>
int launch_finish_of(const FinishCall& p, void* stream) {
  const int64_t grid = static_cast<int64_t>(p.summaries.batch) * p.summaries.num_kv_heads;
  return launch(finish_kernel<T>, grid, 1, kThreads, kFinishSharedBytes, p, stream);
}

int launch_score_float32(const ScoreCall& p, void* stream);
int launch_score_bfloat16(const ScoreCall& p, void* stream);
int launch_score_float16(const ScoreCall& p, void* stream);
int launch_finish_float32(const FinishCall& p, void* stream);
int launch_finish_bfloat16(const FinishCall& p, void* stream);
int launch_finish_float16(const FinishCall& p, void* stream);

}  // namespace cuda
}  // namespace quest
