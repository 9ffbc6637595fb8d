// dlops_cpu: decoding steps.
#include "bind/state_update.h"

STABLE_TORCH_LIBRARY_FRAGMENT(dlops_cpu, m) { dlops::StateUpdateOps<dlops::Cpu>::define(m); }

STABLE_TORCH_LIBRARY_IMPL(dlops_cpu, CompositeExplicitAutograd, m) { dlops::StateUpdateOps<dlops::Cpu>::implement(m); }
