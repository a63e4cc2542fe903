#include "cuda/score_dispatch.h"

namespace quest {
namespace cuda {

template int ScoreInstances<float>::launch(const ScoreCall& p, void* stream);

}  // namespace cuda
}  // namespace quest
