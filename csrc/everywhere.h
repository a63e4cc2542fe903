// Functions that the host, the GPU and every copy of a CPU kernel have in their own code.
#pragma once

// Static on the CPU: copies of a kernel in several instruction sets must not be merged.
#ifdef __CUDACC__
#define QUEST_EVERYWHERE __host__ __device__ __forceinline__
#else
#define QUEST_EVERYWHERE static inline
#endif
