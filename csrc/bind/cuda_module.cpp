// dlops._cuda: importing it registers the dlops_cuda ops.
#include <pybind11/pybind11.h>

namespace py = pybind11;

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "dlops's CUDA kernels; loading this module registers the dlops_cuda ops.";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["compiler"] = __VERSION__;
        info["torch"] = DLOPS_TORCH_VERSION;
        info["cuda"] = DLOPS_CUDA_VERSION;
        info["architectures"] = DLOPS_CUDA_ARCHS;
        return info;
      },
      "The compiler, the torch whose headers were used, the CUDA toolkit, and the GPU architectures compiled for.");
}
