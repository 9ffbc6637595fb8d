// Host elementwise kernels around library matrix products: what csrc/bind passes to them.
// M rows of N elements, unit stride within a row, every output contiguous.
#pragma once

#include "core/activation.h"

namespace dlops {

struct ActivationPass {
  Dtype dtype;
  Activation activation;
  float params[2];
  int64_t rows, width;  // M, N
  int64_t block_rows;   // rows of one task; summed into one row of the partial bias gradients
  const void* x;        // (M, N): pre-activation, or what backward saved, or the gate
  int64_t x_stride;
  const void* up = nullptr;  // (M, N): the factor that is not activated
  int64_t up_stride = 0;
  const void* dy = nullptr;  // (M, N)
  int64_t dy_stride = 0;
  void* out;                  // (M, N): y, dpre or dgate
  void* out_up = nullptr;     // (M, N): dup
  float* dbias = nullptr;     // (ceil(M / block_rows), N) partial sums of out, or null
  float* dbias_up = nullptr;  // the same of out_up
  bool stream;                // write outputs past the caches
};

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
