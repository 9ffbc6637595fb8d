// dlops_cpu: the linear recurrence. The op's check has compared the arguments; here they are checked again as far as
// memory safety goes, and seen as pointers and strides.
#include "cpu/linear_scan.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "bind/scan.h"

namespace dlops {
namespace {

LinearScan linear_scan_of(Held& held, const Tensor& a, const OptionalTensor& initial_state, bool reverse) {
  const bool complex = a.scalar_type() == ScalarType::ComplexFloat;
  LinearScan p{.dtype = complex ? Dtype::kFloat32 : check_dtype("a", a, DeviceType::CPU), .complex = complex};
  check(a.dim() == 3 && a.device().type() == DeviceType::CPU, "a: expected (batch, dim, seqlen) on the cpu, got ", a);
  p.reverse = reverse;
  p.batch = a.size(0), p.dim = a.size(1), p.steps = a.size(2);
  p.a = view(a);
  p.initial_state = parameter(held, "initial_state", initial_state,
                              complex ? ScalarType::ComplexFloat : ScalarType::Float, {p.batch, p.dim});
  return p;
}

// f(begin, end, scratch) over the tasks: wide blocks of channels, which read rows of channels in long pieces, but a few
// per thread.
template <class F>
void run(LinearScan& p, const F& f) {
  constexpr int64_t kWidest = 8;  // vectors
  const auto& kernels = DLOPS_KERNELS(linear_scan_kernels);
  const int64_t vectors = ceil_div(p.dim, kernels.lanes);
  const int64_t wanted = ceil_div(p.batch * vectors, 4 * torch::stable::get_num_threads());
  p.block = std::clamp<int64_t>(wanted, 1, kWidest) * kernels.lanes;
  run_tasks(p.tasks(), p.block * p.steps, kernels.scratch(p), f);
}

Tensor linear_scan(const Tensor& a, const Tensor& b, const OptionalTensor& initial_state, bool reverse) {
  Held held;
  LinearScanForward p{linear_scan_of(held, a, initial_state, reverse)};
  const auto sizes = a.sizes();
  check_like("b", b, a, "a", &sizes);
  Tensor h = allocate_steps(b);
  p.b = view(b);
  p.h = output(h);
  const auto& kernels = DLOPS_KERNELS(linear_scan_kernels);
  run(p, [&](int64_t begin, int64_t end, float* scratch) { kernels.forward(p, begin, end, scratch); });
  return h;
}

std::tuple<Tensor, Tensor, Tensor> linear_scan_backward(const Tensor& dh, const Tensor& a, const Tensor& h,
                                                        const OptionalTensor& initial_state, bool reverse,
                                                        std::vector<bool> mask) {
  check(mask.size() == 3, "output_mask: expected 3 values, got ", mask.size());
  Held held;
  LinearScanBackward p{linear_scan_of(held, a, initial_state, reverse)};
  const auto sizes = a.sizes();
  check_like("dh", dh, a, "a", &sizes);
  check_like("h", h, a, "a", &sizes);
  p.dh = view(dh);
  p.h = view(h);
  Tensor da = mask[0] ? allocate_steps(a) : absent(a), db = mask[1] ? allocate_steps(h) : absent(a);
  Tensor dinitial_state = absent(a);
  if (mask[0]) p.da = output(da);
  if (mask[1]) p.db = output(db);
  if (mask[2]) {
    dinitial_state = allocate(a, {p.batch, p.dim}, p.complex ? ScalarType::ComplexFloat : ScalarType::Float);
    p.dinitial_state = static_cast<float*>(dinitial_state.mutable_data_ptr());
  }
  const auto& kernels = DLOPS_KERNELS(linear_scan_kernels);
  run(p, [&](int64_t begin, int64_t end, float* scratch) { kernels.backward(p, begin, end, scratch); });
  return {da, db, dinitial_state};
}

}  // namespace
}  // namespace dlops

STABLE_TORCH_LIBRARY_FRAGMENT(dlops_cpu, m) {
  m.def("linear_scan(Tensor a, Tensor b, Tensor? initial_state, bool reverse) -> Tensor");
  m.def(
      "linear_scan_backward(Tensor dh, Tensor a, Tensor h, Tensor? initial_state, bool reverse, bool[3] output_mask)"
      " -> (Tensor, Tensor, Tensor)");
}

// For every device, so that a tensor of the wrong one is refused by name rather than by torch's dispatcher.
STABLE_TORCH_LIBRARY_IMPL(dlops_cpu, CompositeExplicitAutograd, m) {
  m.impl("linear_scan", TORCH_BOX(&dlops::linear_scan));
  m.impl("linear_scan_backward", TORCH_BOX(&dlops::linear_scan_backward));
}
