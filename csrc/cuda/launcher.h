// What launchers share: alignment, grid sizes, the device's limits, errors.
#pragma once

#include <algorithm>

#include "core/device.h"

namespace dlops::cuda {

constexpr int64_t kMaxGrid = (int64_t(1) << 31) - 1;  // blocks along x
constexpr int64_t kMaxGridY = 65535;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether p, rows of row_bytes apart, can be read in accesses of 16 bytes.
inline bool aligned(const void* p, int64_t row_bytes = 0) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && row_bytes % 16 == 0;
}

inline const char* describe(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

// What the last launch of this thread did wrong, or null.
inline const char* launch_error() { return describe(cudaGetLastError()); }

inline int64_t device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  return cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess ? value : 0;
}

inline int64_t processors() { return std::max<int64_t>(1, device_attribute(cudaDevAttrMultiProcessorCount)); }

// Dynamic shared memory that a block can have after allow_shared, beside `used` bytes of static arrays.
inline int64_t shared_limit(int64_t used) { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - used; }

// Lets a kernel with `used` bytes of static shared arrays be launched with that much dynamic shared memory; above 48
// KiB together it must be asked for. It asks for all there is: the setting is the kernel's, whatever thread launches it
// next.
template <class Kernel>
const char* allow_shared(Kernel* kernel, int64_t bytes, int64_t used) {
  if (bytes + used <= 48 * 1024) return nullptr;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_limit(used)));
  return launch_error();
}

// Calls f with a null T* of the dtype.
template <class F>
auto with_dtype(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::kBFloat16: return f(static_cast<bfloat16*>(nullptr));
    case Dtype::kFloat16: return f(static_cast<float16*>(nullptr));
    default: return f(static_cast<float*>(nullptr));
  }
}

}  // namespace dlops::cuda
