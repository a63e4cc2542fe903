#include "cuda/score_dispatch.h"

namespace quest {
namespace cuda {

int launch_score_float16(const ScoreCall& p, void* stream) {
  return launch_score_of<Float16>(p, stream);
}

}  // namespace cuda
}  // namespace quest
