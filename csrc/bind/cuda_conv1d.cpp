// dlops_cuda (dlops_simt): the causal convolution.
#include "bind/conv1d.h"
#include "bind/cuda_device.h"

STABLE_TORCH_LIBRARY_FRAGMENT(DLOPS_CUDA_LIBRARY, m) { dlops::Conv1dOps<dlops::Cuda>::define(m); }

STABLE_TORCH_LIBRARY_IMPL(DLOPS_CUDA_LIBRARY, CompositeExplicitAutograd, m) {
  dlops::Conv1dOps<dlops::Cuda>::implement(m);
}
