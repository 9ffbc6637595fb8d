// dlops_cuda (dlops_simt): decoding steps.
#include "bind/cuda_device.h"
#include "bind/state_update.h"

STABLE_TORCH_LIBRARY_FRAGMENT(DLOPS_CUDA_LIBRARY, m) { dlops::StateUpdateOps<dlops::Cuda>::define(m); }

STABLE_TORCH_LIBRARY_IMPL(DLOPS_CUDA_LIBRARY, CompositeExplicitAutograd, m) {
  dlops::StateUpdateOps<dlops::Cuda>::implement(m);
}
