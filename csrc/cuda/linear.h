// Linear layers of few rows (decoding): y = activation(x weight^T + bias), or that times a second product.
#pragma once

#include "core/activation.h"

namespace dlops {

struct SkinnyLinear {
  static constexpr int64_t kMaxRows = 16;

  Dtype dtype;
  Activation activation;
  float params[2];
  int64_t rows, width, depth;  // M, N, K
  const void* x;               // (M, K), rows x_stride elements apart
  int64_t x_stride;
  bool gated;             // whether there is a second weight, whose product multiplies the first's activation
  const void* weight[2];  // (N, K), rows weight_stride elements apart
  int64_t weight_stride[2];
  const void* bias[2];  // (N) or null
  void* y;              // (M, N) contiguous
  void* pre[2];         // (M, N) contiguous products with their bias, or null
  int64_t split_depth;  // of K for a block, from skinny_linear_split_depth
  float* partial;       // (splits, weights, M, N) scratch, or null where split_depth covers K

  int64_t splits() const { return depth > split_depth ? (depth + split_depth - 1) / split_depth : 1; }
};

namespace cuda {

// Returns null, or what went wrong.
const char* skinny_linear(const SkinnyLinear& params, void* stream);

// The split_depth that skinny_linear is fastest with: less than K where N is too small to fill the current device.
int64_t skinny_linear_split_depth(const SkinnyLinear& params);

}  // namespace cuda

}  // namespace dlops
