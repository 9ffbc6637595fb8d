// dlops_cpu: the scan of Mamba-2. The op's check has compared the arguments; here they are checked again as far as
// memory safety goes, and seen as pointers and strides.
#include "cpu/ssd_scan.h"

#include <torch/csrc/stable/library.h>

#include <array>
#include <tuple>

#include "bind/scan.h"

namespace dlops {
namespace {

struct SsdArguments {
  const Tensor &x, &dt, &A, &B, &C;
  const OptionalTensor &D, &z, &dt_bias, &initial_states, &cu_seqlens;
  bool dt_softplus;
  double dt_min, dt_max;
};

SsdTensor ssd_view(const Tensor& x) {
  return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2), x.dim() == 4 ? x.stride(3) : 0};
}

SsdScan ssd_scan_of(Held& held, const SsdArguments& a) {
  SsdScan p{.dtype = check_dtype("x", a.x, DeviceType::CPU), .dt_dtype = check_dtype("dt", a.dt, DeviceType::CPU)};
  check(a.x.dim() == 4, "x: expected (batch, seqlen, nheads, headdim), got ", a.x);
  p.batch = a.x.size(0), p.steps = a.x.size(1), p.heads = a.x.size(2), p.headdim = a.x.size(3);
  check(a.B.dim() == 4, "B: expected (batch, seqlen, ngroups, dstate), got ", a.B);
  p.groups = a.B.size(2), p.states = a.B.size(3);
  check(p.groups > 0 && p.heads % p.groups == 0, "B: expected groups that divide ", p.heads, " heads, got ", a.B);
  const ScalarType dtype = a.x.scalar_type();
  check_exact("dt", a.dt, a.dt.scalar_type(), {p.batch, p.steps, p.heads});
  check_exact("B", a.B, dtype, {p.batch, p.steps, p.groups, p.states});
  check_exact("C", a.C, dtype, {p.batch, p.steps, p.groups, p.states});
  p.x = ssd_view(a.x), p.dt = ssd_view(a.dt), p.B = ssd_view(a.B), p.C = ssd_view(a.C);
  if (a.z) {
    const auto sizes = a.x.sizes();
    check_like("z", *a.z, a.x, "x", &sizes);
    p.z = ssd_view(*a.z);
  }
  p.A = parameter(held, "A", a.A, ScalarType::Float, {p.heads});
  p.D_varies = a.D && a.D->dim() == 2;
  p.D = parameter(held, "D", a.D, ScalarType::Float, p.D_varies ? Sizes{p.heads, p.headdim} : Sizes{p.heads});
  p.dt_bias = parameter(held, "dt_bias", a.dt_bias, ScalarType::Float, {p.heads});
  p.dt_softplus = a.dt_softplus;
  p.dt_min = float(a.dt_min), p.dt_max = float(a.dt_max);
  p.sequences = p.batch;
  if (a.cu_seqlens) {
    check(p.batch == 1, "x: expected batch 1 with cu_seqlens, got ", a.x);
    p.cu_seqlens = bounds(held, *a.cu_seqlens, p.steps);
    p.sequences = a.cu_seqlens->size(0) - 1;
  }
  p.initial_states = parameter(held, "initial_states", a.initial_states, ScalarType::Float,
                               {p.sequences, p.heads, p.headdim, p.states});
  return p;
}

int64_t work(const SsdScan& p) { return p.block * p.steps * p.headdim * (p.states + 1); }

std::tuple<Tensor, Tensor> ssd_scan(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
                                    const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
                                    const OptionalTensor& dt_bias, const OptionalTensor& initial_states,
                                    const OptionalTensor& cu_seqlens, bool dt_softplus, double dt_min, double dt_max) {
  Held held;
  SsdForward p{
      ssd_scan_of(held, {x, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens, dt_softplus, dt_min, dt_max})};
  Tensor y = allocate_like(x);
  Tensor final_states = allocate(x, {p.sequences, p.heads, p.headdim, p.states}, ScalarType::Float);
  p.y = y.mutable_data_ptr();
  p.final_states = final_states.mutable_data_ptr<float>();
  // Many heads share the inner products of C and B, but every thread has a few tasks.
  const int64_t wanted = ceil_div(4 * torch::stable::get_num_threads(), std::max<int64_t>(1, p.batch * p.groups));
  p.block = std::clamp<int64_t>(p.heads / p.groups / wanted, 1, 8);
  const auto& kernels = DLOPS_KERNELS(ssd_kernels);
  run_tasks(p.tasks(), work(p), kernels.forward_scratch(p),
            [&](int64_t begin, int64_t end, float* scratch) { kernels.forward(p, begin, end, scratch); });
  return {y, final_states};
}

using Nine = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Nine ssd_scan_backward(const Tensor& dy, const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
                       const Tensor& C, const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& dt_bias,
                       const OptionalTensor& initial_states, const OptionalTensor& cu_seqlens,
                       const OptionalTensor& dfinal_states, bool dt_softplus, double dt_min, double dt_max,
                       std::vector<bool> mask) {
  check(mask.size() == 9, "output_mask: expected 9 values, got ", mask.size());
  Held held;
  SsdBackward p{
      ssd_scan_of(held, {x, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens, dt_softplus, dt_min, dt_max})};
  const auto sizes = x.sizes();
  check_like("dy", dy, x, "x", &sizes);
  p.dy = ssd_view(dy);
  p.dfinal_states =
      parameter(held, "dfinal_states", dfinal_states, ScalarType::Float, {p.sequences, p.heads, p.headdim, p.states});
  // A function of the shape alone: sums over heads are in its order. Those of B and C take no more memory than x.
  p.block = std::max<int64_t>(4, ceil_div(p.states, std::max<int64_t>(1, p.headdim)));

  mask[5] = mask[5] && D;
  std::array<Tensor, 9> out{absent(x), absent(x), absent(x), absent(x), absent(x),
                            absent(x), absent(x), absent(x), absent(x)};
  const auto whole = [&](int i, const Tensor& like, void*& to) {
    if (!mask[i]) return;
    out[i] = allocate_like(like);
    to = out[i].mutable_data_ptr();
  };
  whole(0, x, p.dx);
  whole(1, dt, p.ddt);
  if (z) whole(6, *z, p.dz);
  if (mask[8]) {
    out[8] = allocate(x, {p.sequences, p.heads, p.headdim, p.states}, ScalarType::Float);
    p.dinitial_states = out[8].mutable_data_ptr<float>();
  }
  std::array<PartialSums, 9> partial;
  const auto summed = [&](int i, int64_t count, int64_t width, float*& to) {
    if (!mask[i]) return;
    partial[i] = PartialSums(x, count, width);
    to = partial[i].data;
  };
  summed(2, p.batch, p.heads, p.dA);
  summed(3, p.blocks(), p.batch * p.steps * p.groups * p.states, p.dB);
  summed(4, p.blocks(), p.batch * p.steps * p.groups * p.states, p.dC);
  if (mask[5]) summed(5, p.batch, D->numel(), p.dD);
  summed(7, p.batch, p.heads, p.ddt_bias);
  const auto& kernels = DLOPS_KERNELS(ssd_kernels);
  run_tasks(p.tasks(), work(p), kernels.backward_scratch(p),
            [&](int64_t begin, int64_t end, float* scratch) { kernels.backward(p, begin, end, scratch); });

  for (int i : {2, 3, 4, 5, 7}) {
    if (!mask[i]) continue;
    out[i] = allocate_like(i == 3 ? B : i == 4 ? C : i == 5 ? *D : A);
    partial[i].sum_into(out[i], i == 3 || i == 4 ? p.dtype : Dtype::kFloat32);
  }
  return {out[0], out[1], out[2], out[3], out[4], out[5], out[6], out[7], out[8]};
}

}  // namespace
}  // namespace dlops

STABLE_TORCH_LIBRARY_FRAGMENT(dlops_cpu, m) {
  m.def(
      "ssd_scan(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias,"
      " Tensor? initial_states, Tensor? cu_seqlens, bool dt_softplus, float dt_min, float dt_max) -> (Tensor, Tensor)");
  m.def(
      "ssd_scan_backward(Tensor dy, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z,"
      " Tensor? dt_bias, Tensor? initial_states, Tensor? cu_seqlens, Tensor? dfinal_states, bool dt_softplus,"
      " float dt_min, float dt_max, bool[9] output_mask)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

// For every device, so that a tensor of the wrong one is refused by name rather than by torch's dispatcher.
STABLE_TORCH_LIBRARY_IMPL(dlops_cpu, CompositeExplicitAutograd, m) {
  m.impl("ssd_scan", TORCH_BOX(&dlops::ssd_scan));
  m.impl("ssd_scan_backward", TORCH_BOX(&dlops::ssd_scan_backward));
}
