#include "cuda/score_dispatch.h"

namespace quest {
namespace cuda {

int launch_score_float32(const ScoreCall& p, void* stream) {
  return launch_score_of<float>(p, stream);
}

}  // namespace cuda
}  // namespace quest
