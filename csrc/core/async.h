// Asynchronous copies from global to shared memory. sm_80 and later.
//
// A thread's copies land once it has committed them to a group and waited for the group; other threads see them after a
// barrier that follows.
#pragma once

#include <cstdint>

#include "core/launch.h"

namespace dlops {
inline namespace DLOPS_ISA {

// kBytes of 4, 8 or 16, both addresses aligned to it. The first `valid` bytes are copied, the rest become zero.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global, int valid = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
#if defined(__CUDACC__)
  const uint32_t to = uint32_t(__cvta_generic_to_shared(shared));
  const size_t from = __cvta_generic_to_global(global);
  if constexpr (kBytes == 16)  // past L1, which only 16 bytes can
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(kBytes), "r"(valid)
                 : "memory");
#else
  simt::copy_async(shared, global, kBytes, valid);
#endif
}

__device__ __forceinline__ void copy_async_commit() {
#if defined(__CUDACC__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  simt::copy_async_commit();
#endif
}

// Waits for all groups of this thread but the last kPending.
template <int kPending = 0>
__device__ __forceinline__ void copy_async_wait() {
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#else
  simt::copy_async_wait(kPending);
#endif
}

}  // namespace DLOPS_ISA
}  // namespace dlops
