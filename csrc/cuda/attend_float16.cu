#include "cuda/attend_dispatch.h"

namespace quest {
namespace cuda {

int launch_attend_float16(const AttendCall& p, int64_t num_works, void* stream) {
  return Float16Instances::launch(p, num_works, stream);
}

}  // namespace cuda
}  // namespace quest
