// dlops._cuda: importing it registers the dlops_cuda ops.
#include <pybind11/pybind11.h>

#ifndef DLOPS_CUDA_ARCHS
#define DLOPS_CUDA_ARCHS ""
#endif

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of dlops, registered as torch.ops.dlops_cuda.";
  m.attr("archs") = DLOPS_CUDA_ARCHS;
}
