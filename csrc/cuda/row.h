// How a chunk of a row is spread over threads.
#pragma once

#include "core/device.h"
#include "cuda/layout.h"

namespace dlops::cuda {

// Bytes of static shared arrays in a norm's kernel, at most: three sums of each warp, for row_sums.
constexpr int64_t kNormStatic = 3 * kMaxWarps * sizeof(float);

// The part of a chunk of a row that one thread holds: kItems packs of kVec elements. A group of adjacent threads holds
// kItems runs of adjacent packs, so that the distance from one item to the next is known to the compiler.
template <int kVec, int kItems>
struct Chunk {
  static constexpr int kStride = kGroup<kVec> * kVec;

  int64_t first;  // column of item 0
  int left;       // columns from there to the row's end, or enough

  __device__ __forceinline__ Chunk(int64_t begin, int64_t end) {
    const int thread = int(threadIdx.x);
    first = begin + thread / kGroup<kVec> * (kStride * kItems) + thread % kGroup<kVec> * kVec;
    left = int(end - first < kStride * kItems ? end - first : kStride * kItems);
  }

  // Columns of a chunk, over all threads.
  __device__ static __forceinline__ int64_t columns() { return int64_t(blockDim.x) * (kVec * kItems); }

  // Calls f(item, offset) for the packs that exist; offset is from `first`.
  template <class F>
  __device__ __forceinline__ void each(F f) const {
#pragma unroll
    for (int item = 0; item < kItems; ++item)
      if (item * kStride < left) f(item, item * kStride);
  }
};

}  // namespace dlops::cuda
