// dlops_cpu: elementwise passes around library matrix products.
#include "bind/activation.h"

#include "bind/cpu.h"

namespace dlops {
namespace {

void run(Pass<Cpu>& pass, void (*kernel)(const ActivationPass&, int64_t, int64_t)) {
  pass.divide(false);
  Cpu::run(pass.params, kernel);
}

Tensor act(const Tensor& pre, std::string activation, std::vector<double> params) {
  Pass<Cpu> pass("pre", pre, activation, params);
  Tensor y = allocate_like(pre);
  pass.params.out = y.mutable_data_ptr();
  run(pass, DLOPS_KERNELS(activation_kernels).act);
  return y;
}

// In place, on a product that nothing else holds: no second buffer, whose fresh pages cost as much as the pass.
void act_(Tensor pre, std::string activation, std::vector<double> params) {
  check(pre.is_contiguous(), "pre: expected a contiguous tensor, got ", pre);
  Pass<Cpu> pass("pre", pre, activation, params);
  pass.params.out = pre.mutable_data_ptr();
  pass.params.stream = false;
  run(pass, DLOPS_KERNELS(activation_kernels).act);
}

Tensor gate(const Tensor& gate, const Tensor& up, std::string activation, std::vector<double> params) {
  Pass<Cpu> pass("gate", gate, activation, params);
  check_same("up", up, gate, "gate");
  pass.add(up, &pass.params.up, &pass.params.up_stride);
  Tensor y = allocate_like(gate);
  pass.params.out = y.mutable_data_ptr();
  run(pass, DLOPS_KERNELS(activation_kernels).gate);
  return y;
}

// In place on the gate's product.
void gate_(Tensor gate, const Tensor& up, std::string activation, std::vector<double> params) {
  check(gate.is_contiguous(), "gate: expected a contiguous tensor, got ", gate);
  Pass<Cpu> pass("gate", gate, activation, params);
  check_same("up", up, gate, "gate");
  pass.add(up, &pass.params.up, &pass.params.up_stride);
  pass.params.out = gate.mutable_data_ptr();
  pass.params.stream = false;
  run(pass, DLOPS_KERNELS(activation_kernels).gate);
}

std::tuple<Tensor, Tensor> maxout(const Tensor& pre, int64_t num_pieces) {
  const Dtype dtype = check_dtype("pre", pre, DeviceType::CPU);
  check(pre.dim() >= 1, "pre: expected at least one dimension, got ", pre);
  const Rows rows = as_rows(pre);
  check(num_pieces >= 1 && rows.width % num_pieces == 0, "num_pieces: expected a positive divisor of pre's last size, ",
        rows.width, ", got ", num_pieces);
  std::vector<int64_t> sizes = leading_sizes(pre);
  sizes.push_back(rows.width / num_pieces);
  Tensor y = allocate(pre, sizes, pre.scalar_type());
  Tensor index = allocate(pre, sizes, ScalarType::Long);
  const MaxoutPass params{
      dtype, sizes.back(), num_pieces, rows.data, rows.stride, y.mutable_data_ptr(), index.mutable_data_ptr<int64_t>()};
  const auto& kernels = DLOPS_KERNELS(activation_kernels);
  parallel(rows.rows, rows.width, [&](int64_t begin, int64_t end) { kernels.maxout(params, begin, end); });
  return {y, index};
}

}  // namespace
}  // namespace dlops

STABLE_TORCH_LIBRARY_FRAGMENT(dlops_cpu, m) {
  dlops::ActivationOps<dlops::Cpu>::define(m);
  m.def("act(Tensor pre, str activation, float[] params) -> Tensor");
  m.def("act_(Tensor(a!) pre, str activation, float[] params) -> ()");
  m.def("gate(Tensor gate, Tensor up, str activation, float[] params) -> Tensor");
  m.def("gate_(Tensor(a!) gate, Tensor up, str activation, float[] params) -> ()");
  m.def("maxout(Tensor pre, int num_pieces) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(dlops_cpu, CompositeExplicitAutograd, m) {
  dlops::ActivationOps<dlops::Cpu>::implement(m);
  m.impl("act", TORCH_BOX(&dlops::act));
  m.impl("act_", TORCH_BOX(&dlops::act_));
  m.impl("gate", TORCH_BOX(&dlops::gate));
  m.impl("gate_", TORCH_BOX(&dlops::gate_));
  m.impl("maxout", TORCH_BOX(&dlops::maxout));
}
