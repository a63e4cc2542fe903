#include "cuda/score_dispatch.h"

namespace quest {
namespace cuda {

template int ScoreInstances<Float16>::launch(const ScoreCall& p, void* stream);

}  // namespace cuda
}  // namespace quest
