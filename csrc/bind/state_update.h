// Decoding steps, on any Device: a struct with
//   kType                              its DeviceType
//   kReadable                          whether the host reads its tensors' elements
//   Guard(x)                           makes x's device the current one while it lives
//   selective_state_update(x, params)  runs the kernel; x is any tensor on the device
//   causal_conv1d_update(x, params)
// The ops' checks have compared the arguments; here they are checked again as far as memory safety goes.
#pragma once

#include <torch/csrc/stable/library.h>

#include "bind/scan.h"
#include "core/state_update.h"

namespace dlops {

template <class Device>
class StateUpdateOps {
  template <class Pointer>
  static Strided<Pointer> strided(Pointer data, const Tensor& x, int first = 0) {
    Strided<Pointer> view{data, {}};
    for (int64_t i = 0; i < x.dim(); ++i) view.stride[first + i] = x.stride(i);
    return view;
  }

  static Strided<const void*> input(const char* name, const Tensor& x, ScalarType dtype, const Sizes& sizes) {
    check_exact(name, x, dtype, sizes, Device::kType);
    return strided(x.const_data_ptr(), x);
  }

  static Strided<const float*> per_channel(const char* name, const OptionalTensor& x, const Sizes& sizes) {
    if (!x) return {};
    check_exact(name, *x, ScalarType::Float, sizes, Device::kType);
    return strided(x->template const_data_ptr<float>(), *x, 1);
  }

  // The entries that the batch elements have in a state; negative numbers name none.
  static const int32_t* entries(Held& held, const char* name, const OptionalTensor& indices, int64_t batch,
                                int64_t count) {
    if (!indices) return nullptr;
    check_exact(name, *indices, ScalarType::Int, {batch}, Device::kType);
    const int32_t* data = held.data<int32_t>(*indices);
    for (int64_t i = 0; Device::kReadable && i < batch; ++i)
      check(data[i] < count, name, ": expected numbers up to ", count - 1, ", got ", data[i]);
    return data;
  }

  static Tensor selective_state_update(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
                                       const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
                                       const OptionalTensor& dt_bias, Tensor state,
                                       const OptionalTensor& state_batch_indices, bool dt_softplus) {
    const typename Device::Guard guard(x);
    Held held;
    ScanUpdate p{.dtype = check_dtype("x", x, Device::kType)};
    p.state_dtype = check_dtype("state", state, Device::kType);
    check(p.state_dtype == p.dtype || p.state_dtype == Dtype::kFloat32, "state: expected float32 or x's dtype, got ",
          state);
    check(x.dim() == 3, "x: expected (batch, nheads, head_dim), got ", x);
    check(A.dim() == 3 && A.size(2) <= kUpdateStates, "A: expected (nheads, head_dim, dstate) with dstate at most ",
          kUpdateStates, ", got ", A);
    check(B.dim() == 3, "B: expected (batch, groups, dstate), got ", B);
    p.batch = x.size(0), p.heads = x.size(1), p.channels = x.size(2), p.states = A.size(2), p.groups = B.size(1);
    check(p.groups > 0 && p.heads % p.groups == 0, "B: expected groups that divide ", p.heads, " heads, got ", B);
    const Sizes sizes{p.batch, p.heads, p.channels}, channels{p.heads, p.channels};
    p.x = input("x", x, x.scalar_type(), sizes);
    p.dt = input("dt", dt, x.scalar_type(), sizes);
    if (z) p.z = input("z", *z, x.scalar_type(), sizes);
    p.B = input("B", B, x.scalar_type(), {p.batch, p.groups, p.states});
    p.C = input("C", C, x.scalar_type(), {p.batch, p.groups, p.states});
    check_exact("A", A, ScalarType::Float, {p.heads, p.channels, p.states}, Device::kType);
    if (p.states == 1 || A.stride(2) == 1 || A.stride(2) == 0) {
      p.A = strided(A.const_data_ptr<float>(), A);
    } else {
      p.A = {held.data<float>(A), {p.channels * p.states, p.states, 1}};
    }
    p.D = per_channel("D", D, channels);
    p.dt_bias = per_channel("dt_bias", dt_bias, channels);
    p.dt_softplus = dt_softplus;
    check(state.dim() == 4, "state: expected (entries, nheads, head_dim, dstate), got ", state);
    p.entries = state_batch_indices ? state.size(0) : p.batch;
    check_exact("state", state, state.scalar_type(), {p.entries, p.heads, p.channels, p.states}, Device::kType);
    p.indices = entries(held, "state_batch_indices", state_batch_indices, p.batch, p.entries);
    p.state = strided(state.mutable_data_ptr(), state);
    Tensor y = allocate(x, sizes, x.scalar_type());
    p.y = strided(y.mutable_data_ptr(), y);
    Device::selective_state_update(x, p);
    return y;
  }

  static Tensor causal_conv1d_update(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                     Tensor conv_state, const OptionalTensor& cache_seqlens,
                                     const OptionalTensor& conv_state_indices, std::string activation,
                                     int64_t dilation) {
    const typename Device::Guard guard(x);
    Held held;
    ConvUpdate p{.dtype = check_dtype("x", x, Device::kType)};
    p.weight_dtype = check_dtype("weight", weight, Device::kType);
    check(x.dim() == 3, "x: expected (batch, dim, seqlen), got ", x);
    check(weight.dim() == 2 && weight.size(1) > 0, "weight: expected (dim, width), got ", weight);
    check(dilation > 0, "dilation: expected a positive number, got ", dilation);
    check(activation == "none" || activation == "silu", "activation: expected none or silu, got ", activation);
    p.batch = x.size(0), p.channels = x.size(1), p.steps = x.size(2), p.width = weight.size(1);
    p.dilation = dilation, p.silu = activation == "silu";
    p.x = strided(x.const_data_ptr(), x);
    check(p.weight_dtype == p.dtype || p.weight_dtype == Dtype::kFloat32, "weight: expected float32 or x's dtype, got ",
          weight);
    check_exact("weight", weight, weight.scalar_type(), {p.channels, p.width}, Device::kType);
    p.weight = strided(weight.const_data_ptr(), weight, 1);
    if (bias) {
      p.bias_dtype = check_dtype("bias", *bias, Device::kType);
      check_exact("bias", *bias, bias->scalar_type(), {p.channels}, Device::kType);
      p.bias = held.data<void>(*bias);
    }
    check(conv_state.dim() == 3 && conv_state.size(2) >= (p.width - 1) * dilation,
          "conv_state: expected (entries, dim, state_len) with state_len at least ", (p.width - 1) * dilation, ", got ",
          conv_state);
    p.state_len = conv_state.size(2);
    p.entries = conv_state_indices ? conv_state.size(0) : p.batch;
    check_exact("conv_state", conv_state, x.scalar_type(), {p.entries, p.channels, p.state_len}, Device::kType);
    p.indices = entries(held, "conv_state_indices", conv_state_indices, p.batch, p.entries);
    if (cache_seqlens) {
      check_exact("cache_seqlens", *cache_seqlens, ScalarType::Int, {p.batch}, Device::kType);
      p.seen = held.data<int32_t>(*cache_seqlens);
    }
    p.state = strided(conv_state.mutable_data_ptr(), conv_state);
    Tensor y = allocate_steps(x);
    p.y = strided(y.mutable_data_ptr(), y);
    Device::causal_conv1d_update(x, p);
    return y;
  }

 public:
  static void define(StableLibrary& m) {
    m.def(
        "selective_state_update(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z,"
        " Tensor? dt_bias, Tensor(a!) state, Tensor? state_batch_indices, bool dt_softplus) -> Tensor");
    m.def(
        "causal_conv1d_update(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) conv_state, Tensor? cache_seqlens,"
        " Tensor? conv_state_indices, str activation, int dilation) -> Tensor");
  }

  // For every device, so that a tensor of the wrong one is refused by name rather than by torch's dispatcher.
  static void implement(StableLibrary& m) {
    m.impl("selective_state_update", TORCH_BOX(&selective_state_update));
    m.impl("causal_conv1d_update", TORCH_BOX(&causal_conv1d_update));
  }
};

}  // namespace dlops
