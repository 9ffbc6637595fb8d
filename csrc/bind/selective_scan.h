// The selective scan's arguments, on any device. The op's check has compared them; here they are checked again as far
// as memory safety goes, and seen as pointers and strides.
#pragma once

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "bind/scan.h"
#include "core/scan.h"

namespace dlops {

using Nine = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

struct ScanArguments {
  const Tensor &u, &delta, &A, &B, &C;
  const OptionalTensor &D, &z, &delta_bias, &initial_state, &cu_seqlens;
  bool delta_softplus;
};

template <DeviceType kType>
ScanCoefficient coefficient(Held& held, const char* name, const Tensor& x, const Scan& p, ScalarType state,
                            ScalarType dtype) {
  if (x.dim() == 2) {
    check_exact(name, x, state, {p.dim, p.states}, kType);
    return {.data = held.data<void>(x), .varies = false};
  }
  check_exact(name, x, p.complex ? state : dtype, {p.batch, p.groups, p.states, p.steps}, kType);
  return {x.const_data_ptr(), true, x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

template <DeviceType kType, bool kHost = kType == DeviceType::CPU>
Scan scan_of(Held& held, const ScanArguments& a) {
  Scan p{.dtype = check_dtype("u", a.u, kType)};
  check(a.u.dim() == 3, "u: expected (batch, dim, seqlen), got ", a.u);
  p.batch = a.u.size(0), p.dim = a.u.size(1), p.steps = a.u.size(2);
  const auto sizes = a.u.sizes();
  check_like("delta", a.delta, a.u, "u", &sizes);
  if (a.z) check_like("z", *a.z, a.u, "u", &sizes);
  p.complex = a.A.scalar_type() == ScalarType::ComplexFloat;
  const ScalarType state = p.complex ? ScalarType::ComplexFloat : ScalarType::Float;
  check(a.A.dim() == 2, "A: expected (dim, dstate), got ", a.A);
  p.states = a.A.size(1);
  check_exact("A", a.A, state, {p.dim, p.states}, kType);
  p.groups = a.B.dim() == 4 ? a.B.size(1) : a.C.dim() == 4 ? a.C.size(1) : 1;
  check(p.groups > 0 && p.dim % p.groups == 0, "B: expected groups that divide ", p.dim, " channels, got ", a.B);
  p.u = view(a.u), p.delta = view(a.delta);
  if (a.z) p.z = view(*a.z);
  p.A = held.data<float>(a.A);
  p.B = coefficient<kType>(held, "B", a.B, p, state, a.u.scalar_type());
  p.C = coefficient<kType>(held, "C", a.C, p, state, a.u.scalar_type());
  p.D = parameter(held, "D", a.D, ScalarType::Float, {p.dim}, kType);
  p.delta_bias = parameter(held, "delta_bias", a.delta_bias, ScalarType::Float, {p.dim}, kType);
  p.delta_softplus = a.delta_softplus;
  p.sequences = p.batch;
  if (a.cu_seqlens) {
    check(p.batch == 1, "u: expected batch 1 with cu_seqlens, got ", a.u);
    p.cu_seqlens = bounds(held, *a.cu_seqlens, p.steps, kType, kHost);
    p.sequences = a.cu_seqlens->size(0) - 1;
    check(p.sequences > 0 || p.steps == 0, "cu_seqlens: expected at least one sequence for ", p.steps, " steps");
  }
  p.initial_state = parameter(held, "initial_state", a.initial_state, state, {p.sequences, p.dim, p.states}, kType);
  p.chunk = 64 * std::max<int64_t>(1, ceil_div(p.states, 16));  // dlops.ops.scan.chunk_length
  return p;
}

inline void define_selective_scan(StableLibrary& m) {
  m.def(
      "selective_scan(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias,"
      " Tensor? initial_state, Tensor? cu_seqlens, bool delta_softplus, bool save) -> (Tensor, Tensor, Tensor)");
  m.def(
      "selective_scan_backward(Tensor dy, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z,"
      " Tensor? delta_bias, Tensor? initial_state, Tensor? cu_seqlens, Tensor? dlast_state, Tensor checkpoints,"
      " bool delta_softplus, bool[9] output_mask)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

}  // namespace dlops
