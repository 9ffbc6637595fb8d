// dlops_cpu: elementwise passes around library matrix products.
#include "cpu/activation.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "bind/cpu.h"

namespace dlops {
namespace {

// Fills the activation and its parameters in.
void set_activation(ActivationPass& pass, const std::string& name, const std::vector<double>& params) {
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

void check_same(const char* name, const Tensor& tensor, const Tensor& like, const char* like_name) {
  const auto sizes = like.sizes();
  check_like(name, tensor, like, like_name, &sizes);
}

// One pass over tensors of x's shape. Without bias gradients rows mean nothing, and contiguous inputs become one.
struct Pass {
  ActivationPass params{};
  std::vector<Rows> inputs;
  bool flat = true;

  Pass(const char* name, const Tensor& x, const std::string& activation, const std::vector<double>& activation_params) {
    params.dtype = check_dtype(name, x, DeviceType::CPU);
    check(x.dim() >= 1, name, ": expected at least one dimension, got ", x);
    set_activation(params, activation, activation_params);
    params.stream = int64_t(x.numel() * x.element_size()) >= kStreamBytes;
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

  int64_t blocks() const { return params.block_rows ? (params.rows + params.block_rows - 1) / params.block_rows : 0; }

  void run(void (*kernel)(const ActivationPass&, int64_t, int64_t), bool sums) {
    if (flat && !sums) {
      params.width *= params.rows;
      params.rows = 1;
    }
    params.block_rows = block_rows(params.rows);
    const int64_t chunks = (params.width + kActivationColumns - 1) / kActivationColumns;
    const int64_t work = std::min(params.rows, params.block_rows) * std::min(params.width, kActivationColumns);
    parallel(blocks() * chunks, work, [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
  }

  // Partial sums for a bias gradient, where it is asked for.
  std::optional<Tensor> partial(const Tensor& x, bool needed, float** data) {
    if (!needed) return std::nullopt;
    params.block_rows = block_rows(params.rows);
    Tensor sums = empty_partial(x, blocks(), params.width);
    *data = sums.mutable_data_ptr<float>();
    return sums;
  }
};

Tensor bias_gradient(const Tensor& x, const Pass& pass, const std::optional<Tensor>& partial) {
  return partial ? column_sum(x, pass.params.dtype, *partial) : absent(x);
}

Tensor act(const Tensor& pre, std::string activation, std::vector<double> params) {
  Pass pass("pre", pre, activation, params);
  Tensor y = allocate_like(pre);
  pass.params.out = y.mutable_data_ptr();
  pass.run(DLOPS_KERNELS(activation_kernels).act, false);
  return y;
}

// In place, on a product that nothing else holds: no second buffer, whose fresh pages cost as much as the pass.
void act_(Tensor pre, std::string activation, std::vector<double> params) {
  check(pre.is_contiguous(), "pre: expected a contiguous tensor, got ", pre);
  Pass pass("pre", pre, activation, params);
  pass.params.out = pre.mutable_data_ptr();
  pass.params.stream = false;
  pass.run(DLOPS_KERNELS(activation_kernels).act, false);
}

std::tuple<Tensor, Tensor> act_backward(const Tensor& dy, const Tensor& saved, std::string activation,
                                        std::vector<double> params, bool need_dbias) {
  Pass pass("saved", saved, activation, params);
  check_same("dy", dy, saved, "saved");
  pass.add(dy, &pass.params.dy, &pass.params.dy_stride);
  Tensor dpre = allocate_like(saved);
  pass.params.out = dpre.mutable_data_ptr();
  const auto dbias = pass.partial(saved, need_dbias, &pass.params.dbias);
  pass.run(DLOPS_KERNELS(activation_kernels).act_backward, need_dbias);
  return {dpre, bias_gradient(saved, pass, dbias)};
}

Tensor gate(const Tensor& gate, const Tensor& up, std::string activation, std::vector<double> params) {
  Pass pass("gate", gate, activation, params);
  check_same("up", up, gate, "gate");
  pass.add(up, &pass.params.up, &pass.params.up_stride);
  Tensor y = allocate_like(gate);
  pass.params.out = y.mutable_data_ptr();
  pass.run(DLOPS_KERNELS(activation_kernels).gate, false);
  return y;
}

// In place on the gate's product.
void gate_(Tensor gate, const Tensor& up, std::string activation, std::vector<double> params) {
  check(gate.is_contiguous(), "gate: expected a contiguous tensor, got ", gate);
  Pass pass("gate", gate, activation, params);
  check_same("up", up, gate, "gate");
  pass.add(up, &pass.params.up, &pass.params.up_stride);
  pass.params.out = gate.mutable_data_ptr();
  pass.params.stream = false;
  pass.run(DLOPS_KERNELS(activation_kernels).gate, false);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gate_backward(const Tensor& dy, const Tensor& gate, const Tensor& up,
                                                         std::string activation, std::vector<double> params,
                                                         bool need_dbias) {
  Pass pass("gate", gate, activation, params);
  check_same("up", up, gate, "gate");
  check_same("dy", dy, gate, "gate");
  pass.add(up, &pass.params.up, &pass.params.up_stride);
  pass.add(dy, &pass.params.dy, &pass.params.dy_stride);
  Tensor dgate = allocate_like(gate), dup = allocate_like(gate);
  pass.params.out = dgate.mutable_data_ptr();
  pass.params.out_up = dup.mutable_data_ptr();
  const auto dbias = pass.partial(gate, need_dbias, &pass.params.dbias);
  const auto dbias_up = pass.partial(gate, need_dbias, &pass.params.dbias_up);
  pass.run(DLOPS_KERNELS(activation_kernels).gate_backward, need_dbias);
  return {dgate, dup, bias_gradient(gate, pass, dbias), bias_gradient(gate, pass, dbias_up)};
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
  m.def("act(Tensor pre, str activation, float[] params) -> Tensor");
  m.def("act_(Tensor(a!) pre, str activation, float[] params) -> ()");
  m.def("act_backward(Tensor dy, Tensor saved, str activation, float[] params, bool need_dbias) -> (Tensor, Tensor)");
  m.def("gate(Tensor gate, Tensor up, str activation, float[] params) -> Tensor");
  m.def("gate_(Tensor(a!) gate, Tensor up, str activation, float[] params) -> ()");
  m.def(
      "gate_backward(Tensor dy, Tensor gate, Tensor up, str activation, float[] params, bool need_dbias)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("maxout(Tensor pre, int num_pieces) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(dlops_cpu, CompositeExplicitAutograd, m) {
  m.impl("act", TORCH_BOX(&dlops::act));
  m.impl("act_", TORCH_BOX(&dlops::act_));
  m.impl("act_backward", TORCH_BOX(&dlops::act_backward));
  m.impl("gate", TORCH_BOX(&dlops::gate));
  m.impl("gate_", TORCH_BOX(&dlops::gate_));
  m.impl("gate_backward", TORCH_BOX(&dlops::gate_backward));
  m.impl("maxout", TORCH_BOX(&dlops::maxout));
}
