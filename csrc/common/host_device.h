// Marks a function that kernels of every backend inline.
#pragma once

#if defined(__CUDACC__)
#define FASTATTN_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Forced inline on the host as well: an out-of-line copy from one instruction set's build could end up serving another.
#define FASTATTN_HOST_DEVICE inline __attribute__((always_inline))
#endif
