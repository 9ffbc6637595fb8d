// dlops_cuda (dlops_simt): gradients around matrix products.
#include "bind/activation.h"
#include "bind/cuda_device.h"

STABLE_TORCH_LIBRARY_FRAGMENT(DLOPS_CUDA_LIBRARY, m) { dlops::ActivationOps<dlops::Cuda>::define(m); }

STABLE_TORCH_LIBRARY_IMPL(DLOPS_CUDA_LIBRARY, CompositeExplicitAutograd, m) {
  dlops::ActivationOps<dlops::Cuda>::implement(m);
}
