// What csrc/bind passes to the norm kernels of any device. M rows of D elements, unit stride within a row.
#pragma once

#include "core/dtype.h"

namespace dlops {

struct NormForward {
  Dtype dtype;
  int64_t rows, width;  // M, D
  const void* x;        // (M, D), rows x_stride elements apart
  int64_t x_stride;
  const void* residual;  // (M, D) or null; added to x before the norm
  int64_t residual_stride;
  void* sum;           // (M, D) contiguous: x + residual, when there is a residual
  const void* weight;  // (D) or null
  const void* bias;    // (D) or null
  float eps;
  void* y;      // (M, D) contiguous
  float* mean;  // (M), or null for the root-mean-square norm
  float* rstd;  // (M)
  bool stream;  // host kernels: write y past the caches
};

struct NormBackward {
  Dtype dtype;
  int64_t rows, width;  // M, D
  int64_t block_rows;   // rows summed into one row of the partial weight gradients
  const void* dy;       // (M, D)
  int64_t dy_stride;
  const void* x;  // (M, D)
  int64_t x_stride;
  const void* weight;  // (D) or null
  const float* mean;   // (M), or null for the root-mean-square norm
  const float* rstd;   // (M)
  const void* dsum;    // (M, D) or null; added to dx
  int64_t dsum_stride;
  void* dx;        // (M, D) contiguous, or null when not asked for
  float* dweight;  // (ceil(M / block_rows), D) partial sums, or null
  float* dbias;    // the same
  bool stream;     // host kernels: write dx past the caches
};

}  // namespace dlops
