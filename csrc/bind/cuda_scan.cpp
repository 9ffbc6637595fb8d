// dlops_cuda (dlops_simt): the selective scan, of real states.
#include <array>

#include "bind/cuda.h"
#include "bind/selective_scan.h"
#include "cuda/column_sum.h"
#include "cuda/scan.h"

namespace dlops {
namespace {

Scan real_scan(Held& held, const ScanArguments& a) {
  check(a.A.scalar_type() == ScalarType::Float, "A: expected float32, got ", a.A);
  check(a.A.dim() == 2 && a.A.size(1) <= cuda::kScanStates, "A: expected (dim, dstate) with at most ",
        cuda::kScanStates, " states, got ", a.A);
  return scan_of<kDevice, false>(held, a);
}

float* floats(Held& held, const Tensor& like, const Sizes& sizes) {
  return held.tensors.emplace_back(allocate(like, sizes, ScalarType::Float)).mutable_data_ptr<float>();
}

std::tuple<Tensor, Tensor, Tensor> selective_scan(const Tensor& u, const Tensor& delta, const Tensor& A,
                                                  const Tensor& B, const Tensor& C, const OptionalTensor& D,
                                                  const OptionalTensor& z, const OptionalTensor& delta_bias,
                                                  const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens,
                                                  bool delta_softplus, bool save) {
  const DeviceGuard guard(u);
  Held held;
  ScanForward p{real_scan(held, {u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus})};
  const cuda::ScanPlan plan = cuda::scan_forward_plan(p);
  p.block = plan.block;
  const int64_t chunks = p.chunks();
  Tensor y = allocate_steps(u);
  Tensor last_state = allocate(A, {p.sequences, p.dim, p.states}, ScalarType::Float);
  const Sizes saved{p.batch, chunks * p.dim, p.states};
  Tensor checkpoints = save ? allocate(A, saved, ScalarType::Float) : absent(A);
  p.y = output(y);
  p.last_state = last_state.mutable_data_ptr<float>();
  if (save)
    p.checkpoints = checkpoints.mutable_data_ptr<float>();
  else if (plan.split)
    p.checkpoints = floats(held, A, saved);
  float* totals = plan.split ? floats(held, A, {p.batch, chunks, p.dim}) : nullptr;
  check_launch("selective_scan", cuda::scan_forward(p, plan, totals, current_stream(u)));
  return {y, last_state, checkpoints};
}

Nine selective_scan_backward(const Tensor& dy, const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
                             const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
                             const OptionalTensor& delta_bias, const OptionalTensor& initial_state,
                             const OptionalTensor& cu_seqlens, const OptionalTensor& dlast_state,
                             const Tensor& checkpoints, bool delta_softplus, std::vector<bool> mask) {
  check(mask.size() == 9, "output_mask: expected 9 values, got ", mask.size());
  const DeviceGuard guard(u);
  Held held;
  ScanBackward p{real_scan(held, {u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus})};
  const cuda::ScanPlan plan = cuda::scan_backward_plan(p);
  p.block = plan.block;
  const int64_t chunks = p.chunks(), rows = p.batch * chunks;
  const auto sizes = u.sizes();
  check_like("dy", dy, u, "u", &sizes);
  p.dy = view(dy);
  const Sizes state{p.sequences, p.dim, p.states}, saved{p.batch, chunks * p.dim, p.states};
  p.dlast_state = parameter(held, "dlast_state", dlast_state, ScalarType::Float, state, kDevice);
  p.checkpoints = parameter(held, "checkpoints", checkpoints, ScalarType::Float, saved, kDevice);

  std::array<Tensor, 9> out{absent(u), absent(u), absent(u), absent(u), absent(u),
                            absent(u), absent(u), absent(u), absent(u)};
  const auto steps = [&](int i, const Tensor& like, ScanOutput& to) {
    if (!mask[i]) return;
    out[i] = allocate_steps(like);
    to = output(out[i]);
  };
  steps(0, u, p.du);
  steps(1, delta, p.ddelta);
  if (z) steps(6, *z, p.dz);
  std::array<ColumnSum, 9> sums{};
  const auto summed = [&](int i, const Tensor& like, int64_t count, int64_t width, float*& to) {
    if (!mask[i]) return;
    to = floats(held, u, {count, width});
    out[i] = allocate_like(like);
    sums[i] = {Dtype::kFloat32, count, width, to, out[i].mutable_data_ptr()};
  };
  const auto coefficient = [&](int i, const Tensor& like, bool varies, float*& to) {
    if (!varies) return summed(i, like, rows, p.dim * p.states, to);
    if (!mask[i]) return;
    const int64_t width = p.batch * p.groups * p.steps * p.states;
    to = floats(held, u, {p.blocks(), width});
    Tensor gradient = allocate(like, {p.batch, p.groups, p.steps, p.states}, like.scalar_type());
    sums[i] = {p.dtype, p.blocks(), width, to, gradient.mutable_data_ptr()};
    out[i] = torch::stable::transpose(gradient, 2, 3);
  };
  summed(2, A, rows, p.dim * p.states, p.dA);
  coefficient(3, B, p.B.varies, p.dB);
  coefficient(4, C, p.C.varies, p.dC);
  if (D) summed(5, *D, rows, p.dim, p.dD);
  if (delta_bias) summed(7, *delta_bias, rows, p.dim, p.ddelta_bias);
  if (mask[8]) {
    out[8] = allocate(A, state, ScalarType::Float);
    p.dinitial_state = out[8].mutable_data_ptr<float>();
  }
  cuda::ScanWorkspace work{.states = floats(held, u, {cuda::scan_backward_states(p, plan)})};
  if (plan.split) {
    work.totals = floats(held, u, {rows, p.dim});
    work.adjoints = floats(held, u, saved);
  }
  check_launch("selective_scan_backward", cuda::scan_backward(p, plan, work, current_stream(u)));
  for (const ColumnSum& sum : sums)
    if (sum.out) check_launch("column_sum", cuda::column_sum(sum, current_stream(u)));
  return {out[0], out[1], out[2], out[3], out[4], out[5], out[6], out[7], out[8]};
}

}  // namespace
}  // namespace dlops

STABLE_TORCH_LIBRARY_FRAGMENT(DLOPS_CUDA_LIBRARY, m) { dlops::define_selective_scan(m); }

STABLE_TORCH_LIBRARY_IMPL(DLOPS_CUDA_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("selective_scan", TORCH_BOX(&dlops::selective_scan));
  m.impl("selective_scan_backward", TORCH_BOX(&dlops::selective_scan_backward));
}
