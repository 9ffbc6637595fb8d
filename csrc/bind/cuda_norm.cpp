// dlops_cuda (dlops_simt): normalisation of the last dimension.
#include "bind/cuda_device.h"
#include "bind/norm.h"

STABLE_TORCH_LIBRARY_FRAGMENT(DLOPS_CUDA_LIBRARY, m) { dlops::NormOps<dlops::Cuda>::define(m); }

STABLE_TORCH_LIBRARY_IMPL(DLOPS_CUDA_LIBRARY, CompositeExplicitAutograd, m) {
  dlops::NormOps<dlops::Cuda>::implement(m);
}
