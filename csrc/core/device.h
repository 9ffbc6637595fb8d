// Device helpers: packs of adjacent elements, sums over a warp or over the x dimension of a block, and what launchers
// ask about the device.
#pragma once

#include <type_traits>

#include "core/dtype.h"
#include "core/launch.h"

namespace dlops {
inline namespace DLOPS_ISA {

// N adjacent elements, moved by one access when they are 16 bytes or less. Kept as words: the compiler would give each
// half a register of its own.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  using Word = std::conditional_t<sizeof(T) * N % 4 == 0, uint32_t, uint16_t>;
  static constexpr int kPerWord = int(sizeof(Word) / sizeof(T));
  Word word[N / kPerWord];

  __device__ __forceinline__ float get(int i) const {
    if constexpr (kPerWord == 2 && std::is_same_v<T, bfloat16>)
      return bits_float(i % 2 ? word[i / 2] & 0xffff0000u : word[i / 2] << 16);
    else if constexpr (sizeof(T) == 2)
      return to_float(T{uint16_t(word[i / kPerWord] >> (16 * (i % kPerWord)))});
    else
      return bits_float(word[i]);
  }

  __device__ static __forceinline__ Pack of(const float (&value)[N]) {
    Pack pack;
#pragma unroll
    for (int i = 0; i < N / kPerWord; ++i) {
      if constexpr (kPerWord == 2)
        pack.word[i] = halves_from_floats<T>(value[2 * i], value[2 * i + 1]);
      else if constexpr (sizeof(T) == 2)
        pack.word[i] = from_float<T>(value[i]).bits;
      else
        pack.word[i] = float_bits(value[i]);
    }
    return pack;
  }
};

// Elements of T in the widest access.
template <class T>
constexpr int kFullVec = 16 / int(sizeof(T));

template <int N, class T>
__device__ __forceinline__ Pack<T, N> load_pack(const T* p) {
  return *reinterpret_cast<const Pack<T, N>*>(p);
}

template <int N, class T>
__device__ __forceinline__ void store_pack(T* p, const Pack<T, N>& pack) {
  *reinterpret_cast<Pack<T, N>*>(p) = pack;
}

// To global memory. The access is spelled out: in a loop the compiler may store a struct word by word.
template <int N, class T>
__device__ __forceinline__ void store_global(T* p, const Pack<T, N>& pack) {
  if constexpr (sizeof(pack) == 16)
    __stcg(reinterpret_cast<uint4*>(p), make_uint4(pack.word[0], pack.word[1], pack.word[2], pack.word[3]));
  else
    store_pack(p, pack);
}

// The pack at base + offset; where base is null, N times `otherwise`.
template <int N, class T>
__device__ __forceinline__ Pack<T, N> load_pack_or(const T* base, int64_t offset, float otherwise) {
  if (base) return load_pack<N>(base + offset);
  float value[N];
#pragma unroll
  for (int i = 0; i < N; ++i) value[i] = otherwise;
  return Pack<T, N>::of(value);
}

constexpr int kWarp = 32;
constexpr int kMaxWarps = 32;

// The sum over `lanes` adjacent lanes, a power of two that divides the warp, in each of them.
__device__ __forceinline__ float warp_sum(float x, int lanes = kWarp) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

// N sums over threadIdx.x for each threadIdx.y, in every thread. blockDim.x is a power of two; every thread of the
// block must call this. scratch holds N floats for each warp.
template <int N>
__device__ __forceinline__ void row_sums(float (&x)[N], float (&scratch)[N][kMaxWarps]) {
  const int threads = int(blockDim.x);
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = warp_sum(x[i], threads < kWarp ? threads : kWarp);
  if (threads <= kWarp) return;
  const int warps = threads / kWarp, first = int(threadIdx.y) * warps;
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  __syncthreads();  // the last call's readers are done
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (lane == 0) scratch[i][first + warp] = x[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = warp_sum(lane < warps ? scratch[i][first + lane] : 0.0f);
}

}  // namespace DLOPS_ISA
}  // namespace dlops
