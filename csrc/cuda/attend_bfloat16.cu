#include "cuda/attend_dispatch.h"

namespace quest {
namespace cuda {

template int AttendInstances<BFloat16>::launch(const AttendCall& p, int64_t num_works,
                                               void* stream);

}  // namespace cuda
}  // namespace quest
