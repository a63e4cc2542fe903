#include "cuda/attend_dispatch.h"

namespace quest {
namespace cuda {

template int AttendInstances<float>::launch(const AttendCall& p, int64_t num_works, void* stream);

}  // namespace cuda
}  // namespace quest
