// dlops_cuda (dlops_simt): linear layers of few rows.
#include <array>
#include <tuple>

#include "bind/activation.h"
#include "bind/cuda.h"
#include "cuda/linear.h"

namespace dlops {
namespace {

using OptionalTensor = std::optional<Tensor>;

// One or two weights (N, K), their biases (N), and what comes of them: y, and the products before the activation.
template <size_t kMatrices>
std::array<Tensor, 1 + kMatrices> forward(const char* op, const Tensor& x, std::array<const Tensor*, kMatrices> weights,
                                          std::array<const OptionalTensor*, kMatrices> biases,
                                          std::array<const char*, kMatrices> suffixes, const std::string& activation,
                                          const std::vector<double>& params, bool save) {
  const Dtype dtype = check_dtype("x", x, kDevice);
  check(x.dim() >= 1, "x: expected at least one dimension, got ", x);
  const DeviceGuard guard(x);
  const Rows rows = as_rows(x);
  check(rows.rows <= SkinnyLinear::kMaxRows, "x: expected at most ", SkinnyLinear::kMaxRows, " rows, got ", x);
  check(weights[0]->dim() == 2, "weight: expected 2 dimensions, got ", *weights[0]);
  const std::array<int64_t, 2> weight_sizes{weights[0]->size(0), rows.width};
  const torch::headeronly::IntHeaderOnlyArrayRef weight_shape(weight_sizes.data(), weight_sizes.size());

  SkinnyLinear pass{.dtype = dtype,
                    .rows = rows.rows,
                    .width = weight_sizes[0],
                    .depth = rows.width,
                    .x = rows.data,
                    .x_stride = rows.stride,
                    .gated = kMatrices == 2};
  set_activation(pass, activation, params);
  std::vector<int64_t> sizes = leading_sizes(x);
  sizes.push_back(pass.width);
  std::array<Tensor, 1 + kMatrices> out;
  out[0] = allocate(x, sizes, x.scalar_type());
  pass.y = out[0].mutable_data_ptr();
  std::array<Rows, kMatrices> weight_rows;
  std::array<Vector, kMatrices> bias_vectors;
  for (size_t i = 0; i < kMatrices; ++i) {
    check_like(("weight" + std::string(suffixes[i])).c_str(), *weights[i], x, "x", &weight_shape);
    weight_rows[i] = as_rows(*weights[i]);
    bias_vectors[i] = check_vector(("bias" + std::string(suffixes[i])).c_str(), *biases[i], x, pass.width);
    pass.weight[i] = weight_rows[i].data;
    pass.weight_stride[i] = weight_rows[i].stride;
    pass.bias[i] = bias_vectors[i].data;
    out[1 + i] = save ? allocate(x, sizes, x.scalar_type()) : absent(x);
    pass.pre[i] = save ? out[1 + i].mutable_data_ptr() : nullptr;
  }
  pass.split_depth = cuda::skinny_linear_split_depth(pass);
  OptionalTensor partial;
  if (const int64_t splits = pass.splits(); splits > 1) {
    partial = allocate(x, {splits, int64_t(kMatrices), pass.rows, pass.width}, ScalarType::Float);
    pass.partial = partial->mutable_data_ptr<float>();
  }
  check_launch(op, cuda::skinny_linear(pass, current_stream(x)));
  return out;
}

std::tuple<Tensor, Tensor> linear_act(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                      std::string activation, std::vector<double> params, bool save) {
  const auto [y, pre] = forward<1>("linear_act", x, {&weight}, {&bias}, {""}, activation, params, save);
  return {y, pre};
}

std::tuple<Tensor, Tensor, Tensor> gated_linear(const Tensor& x, const Tensor& weight_gate, const Tensor& weight_up,
                                                const OptionalTensor& bias_gate, const OptionalTensor& bias_up,
                                                std::string activation, std::vector<double> params, bool save) {
  const auto [y, gate, up] = forward<2>("gated_linear", x, {&weight_gate, &weight_up}, {&bias_gate, &bias_up},
                                        {"_gate", "_up"}, activation, params, save);
  return {y, gate, up};
}

}  // namespace
}  // namespace dlops

STABLE_TORCH_LIBRARY_FRAGMENT(DLOPS_CUDA_LIBRARY, m) {
  m.def(
      "linear_act(Tensor x, Tensor weight, Tensor? bias, str activation, float[] params, bool save)"
      " -> (Tensor, Tensor)");
  m.def(
      "gated_linear(Tensor x, Tensor weight_gate, Tensor weight_up, Tensor? bias_gate, Tensor? bias_up,"
      " str activation, float[] params, bool save) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(DLOPS_CUDA_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("linear_act", TORCH_BOX(&dlops::linear_act));
  m.impl("gated_linear", TORCH_BOX(&dlops::gated_linear));
}
