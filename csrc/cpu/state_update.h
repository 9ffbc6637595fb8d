// Host kernels of the decoding steps. A task is a block of channels of one batch element, and of one head.
#pragma once

#include "core/state_update.h"

namespace dlops {

constexpr int64_t kUpdateChannels = 64;  // of a task; a multiple of every number of lanes

inline int64_t update_blocks(int64_t channels) { return (channels + kUpdateChannels - 1) / kUpdateChannels; }

struct StateUpdateKernels {
  void (*scan)(const ScanUpdate&, int64_t begin_task, int64_t end_task);
  void (*conv)(const ConvUpdate&, int64_t begin_task, int64_t end_task);
};

#define DLOPS_DECLARE(isa)                              \
  namespace isa {                                       \
  extern const StateUpdateKernels state_update_kernels; \
  }
DLOPS_FOR_EACH_ISA(DLOPS_DECLARE)
#undef DLOPS_DECLARE

}  // namespace dlops
