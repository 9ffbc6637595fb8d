// The GPU as bind/norm.h, bind/activation.h, bind/conv1d.h and bind/state_update.h see it.
#pragma once

#include "bind/cuda.h"
#include "cuda/activation.h"
#include "cuda/column_sum.h"
#include "cuda/conv1d.h"
#include "cuda/norm.h"
#include "cuda/state_update.h"

namespace dlops {

struct Cuda {
  static constexpr DeviceType kType = kDevice;
  static constexpr bool kReadable = false;
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

  static int64_t conv1d_partial_sums(const Conv1dBackward& params) { return cuda::conv1d_blocks(params); }
  static int64_t conv1d_scratch(const Conv1dBackward& params) { return cuda::conv1d_scratch(params); }
  static void conv1d_forward(const Tensor& x, const Conv1dForward& params) {
    check_launch("conv1d_forward", cuda::conv1d_forward(params, current_stream(x)));
  }
  static void conv1d_backward(const Tensor& x, const Conv1dBackward& params) {
    check_launch("conv1d_backward", cuda::conv1d_backward(params, current_stream(x)));
  }

  static void selective_state_update(const Tensor& x, const ScanUpdate& params) {
    check_launch("selective_state_update", cuda::selective_state_update(params, current_stream(x)));
  }
  static void causal_conv1d_update(const Tensor& x, const ConvUpdate& params) {
    check_launch("causal_conv1d_update", cuda::causal_conv1d_update(params, current_stream(x)));
  }
};

}  // namespace dlops
