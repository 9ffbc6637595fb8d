// dlops._cuda: importing it registers the dlops_cuda ops.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include "bind/cuda_table.h"

namespace py = pybind11;

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "dlops's CUDA kernels; loading this module registers the dlops_cuda ops.";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["compiler"] = __VERSION__;
        info["torch"] = DLOPS_TORCH_VERSION;
        info["cuda"] = CUDART_VERSION;
        info["architectures"] = DLOPS_CUDA_ARCHS;
        return info;
      },
      "The compiler, the torch whose headers were used, the CUDA toolkit, and the GPU architectures compiled for.");
  m.def(
      "driver_version",
      [] {
        int version = 0;
        cudaDriverGetVersion(&version);
        return version;
      },
      "The newest CUDA version that the driver knows, as 1000 major + 10 minor; 0 without a driver.");
  dlops::define_kernel_table(m);
}
