// dlops_cpu: the causal convolution.
#include "bind/conv1d.h"

#include "bind/cpu.h"

STABLE_TORCH_LIBRARY_FRAGMENT(dlops_cpu, m) { dlops::Conv1dOps<dlops::Cpu>::define(m); }

STABLE_TORCH_LIBRARY_IMPL(dlops_cpu, CompositeExplicitAutograd, m) { dlops::Conv1dOps<dlops::Cpu>::implement(m); }
