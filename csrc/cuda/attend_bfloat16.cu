#include "cuda/attend_dispatch.h"

namespace quest {
namespace cuda {

int launch_attend_bfloat16(const AttendCall& p, int64_t num_works, void* stream) {
  return BFloat16Instances::launch(p, num_works, stream);
}

}  // namespace cuda
}  // namespace quest
