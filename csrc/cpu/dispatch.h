// The kernels of the best instruction-set level that was built and that this CPU has.
#pragma once

#include "params.h"

namespace quest {

// Chosen at the first call. The environment variable QUEST_COMPILE_ISA (scalar, avx2, avx512,
// avx512_bf16 or neon) asks for a level; errors if that one is unknown, was not built or is not in
// the CPU.
const KernelTable& kernels();

}  // namespace quest
