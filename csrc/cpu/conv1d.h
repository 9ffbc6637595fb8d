// Host kernels of the causal convolution.
#pragma once

#include "core/conv1d.h"

namespace dlops {

constexpr int kConv1dChannels = 32;  // of a block where channels are adjacent in memory; else blocks are channels

inline int64_t conv1d_blocks(const Conv1d& params) {
  return params.channels_last ? (params.channels + kConv1dChannels - 1) / kConv1dChannels : params.channels;
}

// A task is a block of channels; of forward, of one sequence, whose blocks follow each other.
struct Conv1dKernels {
  void (*forward)(const Conv1dForward&, int64_t begin, int64_t end);
  void (*backward)(const Conv1dBackward&, int64_t begin, int64_t end);
};

#define DLOPS_DECLARE(isa)                   \
  namespace isa {                            \
  extern const Conv1dKernels conv1d_kernels; \
  }
DLOPS_FOR_EACH_ISA(DLOPS_DECLARE)
#undef DLOPS_DECLARE

}  // namespace dlops
