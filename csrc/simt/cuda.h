// CUDA for the C++ compiler: what a .cu file may use beside the host's own headers. core/launch.h includes it in place
// of the CUDA toolkit's.
#pragma once

#include <cmath>
#include <cstring>

#include "simt/atomics.h"
#include "simt/device.h"
#include "simt/math.h"
#include "simt/matrix.h"
#include "simt/runtime.h"
#include "simt/types.h"
#include "simt/warp.h"

#if defined(__SANITIZE_THREAD__)  // their calls go to hooks.cpp, as single accesses do
extern "C" {
void* memcpy(void* to, const void* from, size_t size) noexcept __asm__("__tsan_memcpy");
void* memmove(void* to, const void* from, size_t size) noexcept __asm__("__tsan_memmove");
void* memset(void* to, int value, size_t size) noexcept __asm__("__tsan_memset");
}
#endif

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(bytes) __attribute__((aligned(bytes)))
// So many no-ops before the kernel's code, for the launch to count; sizeof, because the attribute wants a plain number.
#define __launch_bounds__(threads, ...) \
  __attribute__((patchable_function_entry(sizeof(char[threads]), sizeof(char[threads]))))

#define threadIdx (::dlops::simt::thread_idx())
#define blockIdx (::dlops::simt::block_idx())
#define blockDim (::dlops::simt::block_dim())
#define gridDim (::dlops::simt::grid_dim())
constexpr int warpSize = 32;

#define DLOPS_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::dlops::simt::launch(#kernel, kernel, grid, block, shared_bytes, stream __VA_OPT__(, ) __VA_ARGS__)

#define DLOPS_SHARED(type, name, ...)                                                                                 \
  using name##_array = type __VA_ARGS__;                                                                              \
  static constexpr ::dlops::simt::SharedArray name##_description{#name, sizeof(name##_array), alignof(name##_array)}; \
  name##_array& name = *static_cast<name##_array*>(::dlops::simt::shared_array(name##_description))

#define DLOPS_DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(::dlops::simt::dynamic_shared())

inline void __syncthreads(dlops::simt::Where where = dlops::simt::Where::current()) {
  dlops::simt::block_barrier("__syncthreads", dlops::simt::Vote::kNone, 0, where);
}
inline int __syncthreads_count(int predicate, dlops::simt::Where where = dlops::simt::Where::current()) {
  return dlops::simt::block_barrier("__syncthreads_count", dlops::simt::Vote::kCount, predicate, where);
}
inline int __syncthreads_and(int predicate, dlops::simt::Where where = dlops::simt::Where::current()) {
  return dlops::simt::block_barrier("__syncthreads_and", dlops::simt::Vote::kAnd, predicate, where);
}
inline int __syncthreads_or(int predicate, dlops::simt::Where where = dlops::simt::Where::current()) {
  return dlops::simt::block_barrier("__syncthreads_or", dlops::simt::Vote::kOr, predicate, where);
}
