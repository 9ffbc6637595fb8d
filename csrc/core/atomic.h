// Atomic addition to two adjacent 16-bit elements at once.
#pragma once

#include "core/device.h"

namespace dlops {
inline namespace DLOPS_ISA {

// *p += value, each element rounded to its type. T: bfloat16 or float16; p 4-byte aligned.
template <class T>
__device__ __forceinline__ void atomic_add(Pack<T, 2>* p, Pack<T, 2> value);

#if defined(__CUDACC__)

template <>
__device__ __forceinline__ void atomic_add<float16>(Pack<float16, 2>* p, Pack<float16, 2> value) {
  atomicAdd(reinterpret_cast<__half2*>(p), *reinterpret_cast<const __half2*>(&value));
}

template <>
__device__ __forceinline__ void atomic_add<bfloat16>(Pack<bfloat16, 2>* p, Pack<bfloat16, 2> value) {
  atomicAdd(reinterpret_cast<__nv_bfloat162*>(p), *reinterpret_cast<const __nv_bfloat162*>(&value));
}

#else

template <class T>
__device__ __forceinline__ void atomic_add(Pack<T, 2>* p, Pack<T, 2> value) {
  simt::atomic_update(reinterpret_cast<uint32_t*>(p), [value](uint32_t old) {
    const Pack<T, 2> held = __builtin_bit_cast(Pack<T, 2>, old);
    const Pack<T, 2> pack = Pack<T, 2>::of({held.get(0) + value.get(0), held.get(1) + value.get(1)});
    return __builtin_bit_cast(uint32_t, pack);
  });
}

#endif

}  // namespace DLOPS_ISA
}  // namespace dlops
