// One pass of the elementwise kernels, and the gradients around matrix products, on any Device: a struct with
//   kType, Guard(x), column_sum(x, params), kStreamBytes   as in bind/norm.h
//   activation_block_rows(params)                          the block_rows that its kernels want
//   act_backward(x, params), gate_backward(x, params)      run the kernels; x is any tensor on the device
#pragma once

#include <tuple>

#include "bind/column_sum.h"
#include "core/activation_pass.h"

namespace dlops {

// Fills the activation and its parameters in.
template <class Params>  // with activation and params
void set_activation(Params& pass, const std::string& name, const std::vector<double>& params) {
  if (!parse_activation(name.c_str(), &pass.activation)) {
    std::string accepted;
    for (const ActivationName& known : kActivationNames)
      accepted += (accepted.empty() ? "" : ", ") + std::string(known.name);
    check(false, "activation: expected one of ", accepted, "; got \"", name, "\"");
  }
  const size_t expected = kActivationNames[int(pass.activation)].num_params;
  check(params.size() == expected, "params: expected ", expected, " values for ", name, ", got ", params.size());
  for (size_t i = 0; i < expected; ++i) pass.params[i] = float(params[i]);
}

inline void check_same(const char* name, const Tensor& tensor, const Tensor& like, const char* like_name) {
  const auto sizes = like.sizes();
  check_like(name, tensor, like, like_name, &sizes);
}

// One pass over tensors of x's shape.
template <class Device>
struct Pass {
  ActivationPass params{};
  std::vector<Rows> inputs;
  bool flat = true;

  Pass(const char* name, const Tensor& x, const std::string& activation, const std::vector<double>& activation_params) {
    params.dtype = check_dtype(name, x, Device::kType);
    check(x.dim() >= 1, name, ": expected at least one dimension, got ", x);
    set_activation(params, activation, activation_params);
    params.stream = streams<Device>(x);
    add(x, &params.x, &params.x_stride);
    params.rows = inputs[0].rows;
    params.width = inputs[0].width;
  }

  void add(const Tensor& tensor, const void** data, int64_t* stride) {
    inputs.push_back(as_rows(tensor));
    *data = inputs.back().data;
    *stride = inputs.back().stride;
    flat &= inputs.back().stride == inputs.back().width || inputs.back().rows <= 1;
  }

  // After the last input. Without bias gradients rows mean nothing, and contiguous inputs become one.
  void divide(bool sums) {
    if (flat && !sums) {
      params.width *= params.rows;
      params.rows = 1;
    }
    params.block_rows = Device::activation_block_rows(params);
  }
};

template <class Device>
struct ActivationOps {
  static std::tuple<Tensor, Tensor> act_backward(const Tensor& dy, const Tensor& saved, std::string activation,
                                                 std::vector<double> params, bool need_dbias) {
    Pass<Device> pass("saved", saved, activation, params);
    const typename Device::Guard guard(saved);
    check_same("dy", dy, saved, "saved");
    pass.add(dy, &pass.params.dy, &pass.params.dy_stride);
    pass.divide(need_dbias);
    const PartialSums<Device> dbias(saved, pass.params.dtype, pass.params, need_dbias);
    Tensor dpre = allocate_like(saved);
    pass.params.out = dpre.mutable_data_ptr();
    pass.params.dbias = dbias.data();
    Device::act_backward(saved, pass.params);
    return {dpre, dbias.total(saved)};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> gate_backward(const Tensor& dy, const Tensor& gate,
                                                                  const Tensor& up, std::string activation,
                                                                  std::vector<double> params, bool need_dbias) {
    Pass<Device> pass("gate", gate, activation, params);
    const typename Device::Guard guard(gate);
    check_same("up", up, gate, "gate");
    check_same("dy", dy, gate, "gate");
    pass.add(up, &pass.params.up, &pass.params.up_stride);
    pass.add(dy, &pass.params.dy, &pass.params.dy_stride);
    pass.divide(need_dbias);
    const PartialSums<Device> dbias(gate, pass.params.dtype, pass.params, need_dbias);
    const PartialSums<Device> dbias_up(gate, pass.params.dtype, pass.params, need_dbias);
    Tensor dgate = allocate_like(gate), dup = allocate_like(gate);
    pass.params.out = dgate.mutable_data_ptr();
    pass.params.out_up = dup.mutable_data_ptr();
    pass.params.dbias = dbias.data();
    pass.params.dbias_up = dbias_up.data();
    Device::gate_backward(gate, pass.params);
    return {dgate, dup, dbias.total(gate), dbias_up.total(gate)};
  }

  static void define(StableLibrary& m) {
    m.def("act_backward(Tensor dy, Tensor saved, str activation, float[] params, bool need_dbias) -> (Tensor, Tensor)");
    m.def(
        "gate_backward(Tensor dy, Tensor gate, Tensor up, str activation, float[] params, bool need_dbias)"
        " -> (Tensor, Tensor, Tensor, Tensor)");
  }

  static void implement(StableLibrary& m) {
    m.impl("act_backward", TORCH_BOX(&ActivationOps::act_backward));
    m.impl("gate_backward", TORCH_BOX(&ActivationOps::gate_backward));
  }
};

}  // namespace dlops
