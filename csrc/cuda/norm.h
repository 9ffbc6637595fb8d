// Device normalisation kernels: what csrc/bind passes to them. M rows of D elements, unit stride within a row.
#pragma once

#include "core/dtype.h"

namespace dlops {

struct RmsNormForward {
  Dtype dtype;
  int64_t rows, width;  // M, D
  const void* x;        // (M, D), rows x_stride elements apart
  int64_t x_stride;
  const void* weight;  // (D) or null
  float eps;
  void* y;      // (M, D) contiguous
  float* rstd;  // (M)
};

struct RmsNormBackward {
  Dtype dtype;
  int64_t rows, width;  // M, D
  const void* dy;       // (M, D)
  int64_t dy_stride;
  const void* x;  // (M, D)
  int64_t x_stride;
  const void* weight;  // (D) or null
  const float* rstd;   // (M)
  const void* dsum;    // (M, D) or null; added to dx
  int64_t dsum_stride;
  void* dx;        // (M, D) contiguous, or null when not asked for
  float* partial;  // (rms_norm_backward_blocks, D) scratch, or null when dweight is not asked for
  void* dweight;   // (D), or null
};

namespace cuda {

// Each returns null, or what went wrong.
const char* rms_norm_forward(const RmsNormForward& params, void* stream);
const char* rms_norm_backward(const RmsNormBackward& params, void* stream);

// Rows of partial weight gradients: a function of the shapes, strides and alignments, and of the current device.
int64_t rms_norm_backward_blocks(const RmsNormBackward& params);

}  // namespace cuda

}  // namespace dlops
