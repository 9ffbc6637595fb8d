// Host linear recurrence: what csrc/bind passes to it. Strides are in elements; a state is a float, or a pair (re, im)
// where complex.
#pragma once

#include "cpu/scan.h"

namespace dlops {

struct LinearScan {
  Dtype dtype;  // of all tensors but the states, where they are real
  bool complex, reverse;
  int64_t batch, dim, steps;
  int64_t block;  // channels of a task, a multiple of LinearScanKernels::lanes
  ScanTensor a;
  const float* initial_state;  // (batch, dim) contiguous, or null

  int64_t tasks() const { return batch * ((dim + block - 1) / block); }
};

struct LinearScanForward : LinearScan {
  ScanTensor b;
  ScanOutput h;
};

struct LinearScanBackward : LinearScan {
  ScanTensor dh, h;
  ScanOutput da, db;      // data null where not asked for
  float* dinitial_state;  // (batch, dim) or null
};

struct LinearScanKernels {
  int lanes;
  int64_t (*scratch)(const LinearScan&);  // floats
  void (*forward)(const LinearScanForward&, int64_t begin_task, int64_t end_task, float* scratch);
  void (*backward)(const LinearScanBackward&, int64_t begin_task, int64_t end_task, float* scratch);
};

#define DLOPS_DECLARE(isa)                            \
  namespace isa {                                     \
  extern const LinearScanKernels linear_scan_kernels; \
  }
DLOPS_FOR_EACH_ISA(DLOPS_DECLARE)
#undef DLOPS_DECLARE

}  // namespace dlops
