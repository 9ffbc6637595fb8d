// Device helpers: 16-byte packs and sums over a warp or over the x dimension of a block.
#pragma once

#include "core/dtype.h"
#include "core/launch.h"

namespace dlops {
inline namespace DLOPS_ISA {

// N adjacent elements, moved by one access when sizeof is 16 bytes or less.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T value[N];
};

template <int N, class T>
__device__ __forceinline__ Pack<T, N> load_pack(const T* p) {
  return *reinterpret_cast<const Pack<T, N>*>(p);
}

template <int N, class T>
__device__ __forceinline__ void store_pack(T* p, const Pack<T, N>& pack) {
  *reinterpret_cast<Pack<T, N>*>(p) = pack;
}

constexpr int kWarp = 32;
constexpr int kMaxWarps = 32;

__device__ __forceinline__ float warp_sum(float x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

// The sum over threadIdx.x for each threadIdx.y, in every thread; blockDim.x is a multiple of a warp. scratch holds one
// float per warp of the block. Every thread of the block must call this unless blockDim.x is one warp.
__device__ __forceinline__ float row_sum(float x, float* scratch) {
  x = warp_sum(x);
  const int warps = blockDim.x / kWarp;
  if (warps == 1) return x;
  float* row = scratch + threadIdx.y * warps;
  __syncthreads();  // the last call's readers are done
  if (threadIdx.x % kWarp == 0) row[threadIdx.x / kWarp] = x;
  __syncthreads();
  const int lane = threadIdx.x % kWarp;
  return warp_sum(lane < warps ? row[lane] : 0.0f);
}

}  // namespace DLOPS_ISA
}  // namespace dlops
