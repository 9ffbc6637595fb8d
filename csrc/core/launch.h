// What device code needs from its runtime: CUDA's, or on a CPU csrc/simt.
#pragma once

#if defined(__CUDACC__)
#include <cuda_runtime.h>

#define DLOPS_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<(grid), (block), (shared_bytes), (stream)>>>(__VA_ARGS__)

// An array in the block's shared memory: DLOPS_SHARED(float, sums, [8][32]) declares float sums[8][32].
#define DLOPS_SHARED(type, name, ...) __shared__ type name __VA_ARGS__

// The block's dynamic shared memory as an array of type, 16-byte aligned.
#define DLOPS_DYNAMIC_SHARED(type, name)                   \
  extern __shared__ __align__(16) unsigned char name##_[]; \
  type* name = reinterpret_cast<type*>(name##_)
#else
#include "simt/cuda.h"
#endif
