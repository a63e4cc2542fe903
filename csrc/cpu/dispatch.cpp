#include "cpu/dispatch.h"

#include <cstdlib>
#include <cstring>

#include "checks.h"

namespace quest {

#define QUEST_DECLARE_LEVEL(level)   \
  namespace level {                  \
  extern const KernelTable kKernels; \
  }
QUEST_DECLARE_LEVEL(scalar)
QUEST_DECLARE_LEVEL(avx2)
QUEST_DECLARE_LEVEL(avx512)
QUEST_DECLARE_LEVEL(avx512_bf16)
QUEST_DECLARE_LEVEL(neon)

namespace {

#if defined(__x86_64__)
bool cpu_has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2");
}
bool cpu_has_avx512() {
  return cpu_has_avx2() && __builtin_cpu_supports("avx512f") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool cpu_has_avx512_bf16() {
  return cpu_has_avx512() && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("avx512vnni");
}
#endif

// Table of the level `name` if it was built and the CPU has it.
const KernelTable* usable(const char* name) {
#if defined(QUEST_HAVE_AVX512_BF16)
  if (!strcmp(name, "avx512_bf16") && cpu_has_avx512_bf16()) return &avx512_bf16::kKernels;
#endif
#if defined(QUEST_HAVE_AVX512)
  if (!strcmp(name, "avx512") && cpu_has_avx512()) return &avx512::kKernels;
#endif
#if defined(QUEST_HAVE_AVX2)
  if (!strcmp(name, "avx2") && cpu_has_avx2()) return &avx2::kKernels;
#endif
#if defined(QUEST_HAVE_NEON)
  if (!strcmp(name, "neon")) return &neon::kKernels;
#endif
  return strcmp(name, "scalar") ? nullptr : &scalar::kKernels;
}

const KernelTable& choose() {
  if (const char* wanted = std::getenv("QUEST_COMPILE_ISA")) {
    const KernelTable* table = usable(wanted);
    QUEST_CHECK(table,
                "QUEST_COMPILE_ISA: expected an instruction-set level of this build and CPU, got '",
                wanted, "'");
    return *table;
  }
  for (const char* name : {"avx512_bf16", "avx512", "avx2", "neon"}) {
    if (const KernelTable* table = usable(name)) return *table;
  }
  return scalar::kKernels;
}

}  // namespace

const KernelTable& kernels() {
  static const KernelTable& table = choose();
  return table;
}

}  // namespace quest
