// What the cuda_*.cpp bindings need beside check.h. They are compiled twice: into dlops._cuda, and with DLOPS_SIMT into
// dlops._simt, which runs the same kernels on CPU tensors. The differences are all here.
#pragma once

#include "bind/check.h"

#if defined(DLOPS_SIMT)
#define DLOPS_CUDA_LIBRARY dlops_simt
#else
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#define DLOPS_CUDA_LIBRARY dlops_cuda
#endif

namespace dlops {

#if defined(DLOPS_SIMT)

constexpr DeviceType kDevice = DeviceType::CPU;

struct DeviceGuard {
  explicit DeviceGuard(const Tensor&) {}
};

inline void* current_stream(const Tensor&) { return nullptr; }

#else

constexpr DeviceType kDevice = DeviceType::CUDA;

// Makes x's device the current one while it lives.
struct DeviceGuard {
  explicit DeviceGuard(const Tensor& x) : guard(x.get_device_index()) {}
  torch::stable::accelerator::DeviceGuard guard;
};

inline void* current_stream(const Tensor& x) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return stream;
}

#endif

inline void check_launch(const char* op, const char* error) {
  check(!error, op, ": the kernel did not start: ", error);
}

}  // namespace dlops
