// Host normalisation kernels: what csrc/bind passes to them. M rows of D elements, unit stride within a row.
#pragma once

#include "core/dtype.h"

namespace dlops {

struct NormForward {
  Dtype dtype;
  int64_t width;  // D
  const void* x;  // (M, D), rows x_stride elements apart
  int64_t x_stride;
  const void* residual = nullptr;  // (M, D) or null; added to x before the norm
  int64_t residual_stride = 0;
  void* sum = nullptr;           // (M, D) contiguous: x + residual, when there is a residual
  const void* weight = nullptr;  // (D) or null
  const void* bias = nullptr;    // (D) or null
  double eps;
  void* y;                // (M, D) contiguous
  float* mean = nullptr;  // (M), or null for the root-mean-square norm
  float* rstd;            // (M)
  bool stream;            // write y past the caches
};

struct NormBackward {
  Dtype dtype;
  int64_t rows, width;  // M, D
  int64_t block_rows;   // rows summed into one row of the partial weight gradients
  const void* dy;       // (M, D)
  int64_t dy_stride;
  const void* x;  // (M, D)
  int64_t x_stride;
  const void* weight = nullptr;  // (D) or null
  const float* mean = nullptr;   // (M), or null for the root-mean-square norm
  const float* rstd;             // (M)
  const void* dsum = nullptr;    // (M, D) or null; added to dx
  int64_t dsum_stride = 0;
  void* dx = nullptr;        // (M, D) contiguous, or null when not asked for
  float* dweight = nullptr;  // (ceil(M / block_rows), D) partial sums, or null
  float* dbias = nullptr;    // the same
  bool stream;               // write dx past the caches
};

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
