// Host selective scan. A block of channels is a multiple of `lanes`, or the group.
#pragma once

#include "core/scan.h"

namespace dlops {

struct ScanKernels {
  int lanes;
  int64_t (*forward_scratch)(const Scan&);  // floats
  int64_t (*backward_scratch)(const Scan&);
  void (*forward)(const ScanForward&, int64_t begin_task, int64_t end_task, float* scratch);
  void (*backward)(const ScanBackward&, int64_t begin_task, int64_t end_task, float* scratch);
};

#define DLOPS_DECLARE(isa)               \
  namespace isa {                        \
  extern const ScanKernels scan_kernels; \
  }
DLOPS_FOR_EACH_ISA(DLOPS_DECLARE)
#undef DLOPS_DECLARE

}  // namespace dlops
