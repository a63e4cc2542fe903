#include "cuda/score_dispatch.h"

namespace quest {
namespace cuda {

int launch_score_bfloat16(const ScoreCall& p, void* stream) {
  return launch_score_of<BFloat16>(p, stream);
}

}  // namespace cuda
}  // namespace quest
