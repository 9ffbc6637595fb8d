// dlops_cpu: normalisation of the last dimension.
#include "bind/norm.h"

#include "bind/cpu.h"

STABLE_TORCH_LIBRARY_FRAGMENT(dlops_cpu, m) { dlops::NormOps<dlops::Cpu>::define(m); }

// For every device, so that a tensor of the wrong one is refused by name rather than by torch's dispatcher.
STABLE_TORCH_LIBRARY_IMPL(dlops_cpu, CompositeExplicitAutograd, m) { dlops::NormOps<dlops::Cpu>::implement(m); }
