// Host elementwise kernels around library matrix products.
#pragma once

#include "core/activation_pass.h"

namespace dlops {

struct MaxoutPass {
  Dtype dtype;
  int64_t width, num_pieces;  // outputs per row; inputs per output
  const void* x;              // (M, width * num_pieces)
  int64_t x_stride;
  void* y;         // (M, width)
  int64_t* index;  // (M, width)
};

constexpr int64_t kActivationColumns = 1024;  // a task is block_rows rows of this many columns, columns innermost

struct ActivationKernels {
  void (*act)(const ActivationPass&, int64_t begin_task, int64_t end_task);
  void (*act_backward)(const ActivationPass&, int64_t begin_task, int64_t end_task);
  void (*gate)(const ActivationPass&, int64_t begin_task, int64_t end_task);
  void (*gate_backward)(const ActivationPass&, int64_t begin_task, int64_t end_task);
  void (*maxout)(const MaxoutPass&, int64_t begin_row, int64_t end_row);
};

#define DLOPS_DECLARE(isa)                           \
  namespace isa {                                    \
  extern const ActivationKernels activation_kernels; \
  }
DLOPS_FOR_EACH_ISA(DLOPS_DECLARE)
#undef DLOPS_DECLARE

}  // namespace dlops
