#include "simt/device.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>

#include "simt/launch.h"
#include "simt/report.h"
#include "simt/shared.h"
#include "simt/worker.h"

namespace {

constexpr int kProcessors = 4;

thread_local cudaError_t last_error = cudaSuccess;

std::mutex shared_limits_mutex;
std::map<const void*, size_t> shared_limits;  // of dynamic shared memory, by kernel

cudaError_t fail(cudaError_t error) { return last_error = error; }

size_t dynamic_limit(const void* kernel) {  // 0: nothing was asked for
  const std::lock_guard lock(shared_limits_mutex);
  const auto found = shared_limits.find(kernel);
  return found == shared_limits.end() ? 0 : found->second;
}

}  // namespace

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

cudaError_t cudaPeekAtLastError() { return last_error; }

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
  }
  return "unrecognized error code";
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  using namespace dlops::simt;
  if (device != 0) return fail(cudaErrorInvalidValue);
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = kMaxThreads; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = kMaxUnasked; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = kMaxShared; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = kMaxShared + 1024; break;
    case cudaDevAttrMultiProcessorCount: *value = kProcessors; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 1536; break;
    case cudaDevAttrWarpSize: *value = kWarpSize; break;
    case cudaDevAttrComputeCapabilityMajor: *value = 8; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    case cudaDevAttrL2CacheSize: *value = 1 << 20; break;
    default: return fail(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}

namespace dlops::simt {

cudaError_t set_function_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;
  if (value < 0 || size_t(value) > kMaxShared) return fail(cudaErrorInvalidValue);
  const std::lock_guard lock(shared_limits_mutex);
  const auto [limit, first] = shared_limits.try_emplace(kernel, value);
  if (!first && limit->second != size_t(value))
    throw std::runtime_error(text("a kernel's limit of dynamic shared memory changes from ", limit->second, " to ",
                                  value, " bytes: a launch by another thread may need the other one"));
  return cudaSuccess;
}

size_t shared_limit(const void* kernel) { return dynamic_limit(kernel) ? kMaxShared : kMaxUnasked; }

bool device_accepts(const Launch& launch) {
  const dim3 grid = launch.grid, block = launch.block;
  const bool grid_fits = grid.x - 1 < 0x7fffffffu && grid.y - 1 < 65535 && grid.z - 1 < 65535;
  const bool block_fits = block.x - 1 < 1024 && block.y - 1 < 1024 && block.z - 1 < 64;
  const size_t limit = std::max(kMaxUnasked, dynamic_limit(launch.kernel));
  if (!grid_fits || !block_fits || block.x * block.y * block.z > kMaxThreads)
    last_error = cudaErrorInvalidConfiguration;
  else if (launch.shared_bytes > limit)
    last_error = cudaErrorInvalidValue;
  else
    return true;
  return false;
}

}  // namespace dlops::simt
