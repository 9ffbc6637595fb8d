// The GPU as bind/norm.h and bind/activation.h see it.
#pragma once

#include "bind/cuda.h"
#include "cuda/activation.h"
#include "cuda/column_sum.h"
#include "cuda/norm.h"

namespace dlops {

struct Cuda {
  static constexpr DeviceType kType = kDevice;
  static constexpr int64_t kStreamBytes = INT64_MAX;
  using Guard = DeviceGuard;

  static int64_t norm_block_rows(const NormBackward& params) { return cuda::norm_backward_block_rows(params); }
  static int64_t activation_block_rows(const ActivationPass& params) { return cuda::activation_block_rows(params); }

  static void column_sum(const Tensor& x, const ColumnSum& params) {
    check_launch("column_sum", cuda::column_sum(params, current_stream(x)));
  }
  static void norm_forward(const Tensor& x, const NormForward& params) {
    check_launch("norm_forward", cuda::norm_forward(params, current_stream(x)));
  }
  static void norm_backward(const Tensor& x, const NormBackward& params) {
    check_launch("norm_backward", cuda::norm_backward(params, current_stream(x)));
  }
  static void act_backward(const Tensor& x, const ActivationPass& params) {
    check_launch("act_backward", cuda::act_backward(params, current_stream(x)));
  }
  static void gate_backward(const Tensor& x, const ActivationPass& params) {
    check_launch("gate_backward", cuda::gate_backward(params, current_stream(x)));
  }
};

}  // namespace dlops
