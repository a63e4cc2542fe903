#include "cuda/score_dispatch.h"

namespace quest {
namespace cuda {

int launch_score_float32(const ScoreCall& p, void* stream) {
  return launch_score_of<float>(p, stream);
}

int launch_finish_float32(const FinishCall& p, void* stream) {
  return launch_finish_of<float>(p, stream);
}

}  // namespace cuda
}  // namespace quest
