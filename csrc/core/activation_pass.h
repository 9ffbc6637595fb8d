// What csrc/bind passes to the elementwise kernels around matrix products, on any device.
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
  bool stream;                // host kernels: write outputs past the caches
};

}  // namespace dlops
