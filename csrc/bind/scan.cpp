// dlops_cpu: the selective scan. The op's check has compared the arguments; here they are checked again as far as
// memory safety goes, and seen as pointers and strides.
#include <torch/csrc/stable/library.h>

#include <array>
#include <tuple>

#include "bind/selective_scan.h"

namespace dlops {
namespace {

// Sets the channels of a task: wide blocks, which read u's rows in long pieces, but about `tasks` tasks, at most `most`
// blocks of a group, and states that stay in cache.
void split(Scan& p, int lanes, int64_t tasks, int64_t most) {
  constexpr int64_t kStates = 1024;  // vectors
  const int64_t vectors = ceil_div(p.dim / p.groups, lanes);
  const int64_t wanted =
      std::max(ceil_div(tasks, std::max<int64_t>(1, p.batch * p.groups)), ceil_div(vectors * p.states, kStates));
  const int64_t blocks = std::max<int64_t>(1, std::min({wanted, vectors, most}));
  p.block = std::max<int64_t>(1, ceil_div(vectors, blocks)) * lanes;
}

// f(begin, end, scratch) over the tasks.
template <class F>
void run(const Scan& p, int64_t scratch, const F& f) {
  run_tasks(p.tasks(), p.block * p.steps * p.states, scratch, f);
}

std::tuple<Tensor, Tensor, Tensor> selective_scan(const Tensor& u, const Tensor& delta, const Tensor& A,
                                                  const Tensor& B, const Tensor& C, const OptionalTensor& D,
                                                  const OptionalTensor& z, const OptionalTensor& delta_bias,
                                                  const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens,
                                                  bool delta_softplus, bool save) {
  Held held;
  ScanForward p{
      scan_of<DeviceType::CPU>(held, {u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus})};
  Tensor y = allocate_steps(u);
  Tensor last_state = allocate(A, {p.sequences, p.dim, p.states}, A.scalar_type());
  const Sizes saved{p.batch, p.chunks() * p.dim, p.states};
  Tensor checkpoints = save ? allocate(A, saved, A.scalar_type()) : absent(A);
  p.y = output(y);
  p.last_state = static_cast<float*>(last_state.mutable_data_ptr());
  p.checkpoints = save ? static_cast<float*>(checkpoints.mutable_data_ptr()) : nullptr;
  const auto& kernels = DLOPS_KERNELS(scan_kernels);
  split(p, kernels.lanes, 4 * torch::stable::get_num_threads(), p.dim);
  run(p, kernels.forward_scratch(p),
      [&](int64_t begin, int64_t end, float* scratch) { kernels.forward(p, begin, end, scratch); });
  return {y, last_state, checkpoints};
}

Nine selective_scan_backward(const Tensor& dy, const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
                             const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
                             const OptionalTensor& delta_bias, const OptionalTensor& initial_state,
                             const OptionalTensor& cu_seqlens, const OptionalTensor& dlast_state,
                             const Tensor& checkpoints, bool delta_softplus, std::vector<bool> mask) {
  check(mask.size() == 9, "output_mask: expected 9 values, got ", mask.size());
  Held held;
  ScanBackward p{
      scan_of<DeviceType::CPU>(held, {u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus})};
  const auto sizes = u.sizes();
  check_like("dy", dy, u, "u", &sizes);
  p.dy = view(dy);
  p.dlast_state = parameter(held, "dlast_state", dlast_state, A.scalar_type(), {p.sequences, p.dim, p.states});
  const Sizes saved{p.batch, p.chunks() * p.dim, p.states};
  p.checkpoints = parameter(held, "checkpoints", checkpoints, A.scalar_type(), saved);

  const auto& kernels = DLOPS_KERNELS(scan_kernels);
  // Sums over blocks of channels take no more memory than u, or four times the gradient where that is more.
  const int64_t most = std::max<int64_t>(4, p.dim / std::max<int64_t>(1, p.groups * p.states));
  const bool varies = p.B.varies || p.C.varies;
  split(p, kernels.lanes, varies ? 32 : 64, varies ? most : p.dim);

  const int64_t parts = p.complex ? 2 : 1;
  mask[5] = mask[5] && D;
  mask[7] = mask[7] && delta_bias;
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
  std::array<PartialSums, 9> partial;
  const auto summed = [&](int i, int64_t count, int64_t width, float*& to) {
    if (!mask[i]) return;
    partial[i] = PartialSums(u, count, width);
    to = partial[i].data;
  };
  const auto coefficient = [&](int i, const ScanCoefficient& x, float*& to) {
    if (x.varies)
      summed(i, p.blocks(), p.batch * p.groups * p.steps * p.states * parts, to);
    else
      summed(i, p.batch, p.dim * p.states * parts, to);
  };
  summed(2, p.batch, p.dim * p.states * parts, p.dA);
  coefficient(3, p.B, p.dB);
  coefficient(4, p.C, p.dC);
  summed(5, p.batch, p.dim, p.dD);
  summed(7, p.batch, p.dim, p.ddelta_bias);
  if (mask[8]) {
    out[8] = allocate(A, {p.sequences, p.dim, p.states}, A.scalar_type());
    p.dinitial_state = static_cast<float*>(out[8].mutable_data_ptr());
  }
  run(p, kernels.backward_scratch(p),
      [&](int64_t begin, int64_t end, float* scratch) { kernels.backward(p, begin, end, scratch); });

  for (int i : {2, 3, 4, 5, 7}) {
    if (!mask[i]) continue;
    const bool steps_sum = (i == 3 && p.B.varies) || (i == 4 && p.C.varies);
    const Tensor& like = i == 3 ? B : i == 4 ? C : i == 2 ? A : i == 5 ? *D : *delta_bias;
    out[i] =
        steps_sum ? allocate(like, {p.batch, p.groups, p.steps, p.states}, like.scalar_type()) : allocate_like(like);
    partial[i].sum_into(out[i], steps_sum && !p.complex ? p.dtype : Dtype::kFloat32);
    if (steps_sum) out[i] = torch::stable::transpose(out[i], 2, 3);
  }
  return {out[0], out[1], out[2], out[3], out[4], out[5], out[6], out[7], out[8]};
}

}  // namespace
}  // namespace dlops

STABLE_TORCH_LIBRARY_FRAGMENT(dlops_cpu, m) { dlops::define_selective_scan(m); }

// For every device, so that a tensor of the wrong one is refused by name rather than by torch's dispatcher.
STABLE_TORCH_LIBRARY_IMPL(dlops_cpu, CompositeExplicitAutograd, m) {
  m.impl("selective_scan", TORCH_BOX(&dlops::selective_scan));
  m.impl("selective_scan_backward", TORCH_BOX(&dlops::selective_scan_backward));
}
