// Host normalisation kernels.
#pragma once

#include "core/norm.h"

namespace dlops {

struct NormKernels {
  void (*forward)(const NormForward&, int64_t begin_row, int64_t end_row);
  void (*backward)(const NormBackward&, int64_t begin_block, int64_t end_block, float* scratch);  // scratch: (2, D)
};

#define DLOPS_DECLARE(isa)               \
  namespace isa {                        \
  extern const NormKernels norm_kernels; \
  }
DLOPS_FOR_EACH_ISA(DLOPS_DECLARE)
#undef DLOPS_DECLARE

}  // namespace dlops
