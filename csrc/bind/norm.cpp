// dlops_cpu: normalisation of the last dimension.
#include "cpu/norm.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "bind/cpu.h"

namespace dlops {
namespace {

using OptionalTensor = std::optional<Tensor>;

struct Forward {
  Tensor y, sum;  // sum is x's copy when there is no residual
  OptionalTensor mean;
  Tensor rstd;
};

Forward forward(const Tensor& x, const Tensor* residual, const OptionalTensor& weight, const OptionalTensor& bias,
                double eps, bool centred) {
  const Dtype dtype = check_dtype("x", x, DeviceType::CPU);
  check(x.dim() >= 1, "x: expected at least one dimension, got ", x);
  const auto sizes = x.sizes();
  if (residual) check_like("residual", *residual, x, "x", &sizes);
  const Rows rows = as_rows(x);
  const Vector w = check_vector("weight", weight, x, rows.width);
  const Vector b = check_vector("bias", bias, x, rows.width);

  Forward out{allocate_like(x), x, std::nullopt, allocate(x, leading_sizes(x), ScalarType::Float)};
  NormForward params{.dtype = dtype,
                     .width = rows.width,
                     .x = rows.data,
                     .x_stride = rows.stride,
                     .weight = w.data,
                     .bias = b.data,
                     .eps = eps,
                     .y = out.y.mutable_data_ptr(),
                     .rstd = out.rstd.mutable_data_ptr<float>(),
                     .stream = int64_t(x.numel() * x.element_size()) >= kStreamBytes};
  Rows residual_rows;
  if (residual) {
    residual_rows = as_rows(*residual);
    out.sum = allocate_like(x);
    params.residual = residual_rows.data;
    params.residual_stride = residual_rows.stride;
    params.sum = out.sum.mutable_data_ptr();
  }
  if (centred) {
    out.mean = allocate(x, leading_sizes(x), ScalarType::Float);
    params.mean = out.mean->mutable_data_ptr<float>();
  }
  const auto& kernels = DLOPS_KERNELS(norm_kernels);
  parallel(rows.rows, rows.width, [&](int64_t begin, int64_t end) { kernels.forward(params, begin, end); });
  return out;
}

struct Backward {
  Tensor dx, dweight, dbias;
};

Backward backward(const Tensor& dy, const Tensor& x, const OptionalTensor& weight, const Tensor* mean,
                  const Tensor& rstd, const OptionalTensor& dsum, const std::vector<bool>& output_mask) {
  const size_t outputs = mean ? 3 : 2;
  check(output_mask.size() == outputs, "output_mask: expected ", outputs, " values, got ", output_mask.size());
  const Dtype dtype = check_dtype("x", x, DeviceType::CPU);
  check(x.dim() >= 1, "x: expected at least one dimension, got ", x);
  const auto sizes = x.sizes();
  check_like("dy", dy, x, "x", &sizes);
  if (dsum) check_like("dsum", *dsum, x, "x", &sizes);
  const Vector rstd_vector = check_statistic("rstd", rstd, x);
  const Vector mean_vector = mean ? check_statistic("mean", *mean, x) : Vector{};
  const Vector w = check_vector("weight", weight, x, x.size(x.dim() - 1));
  Backward out{absent(x), absent(x), absent(x)};
  const bool want_dx = output_mask[0], want_dweight = output_mask[1], want_dbias = mean && output_mask[2];
  if (!want_dx && !want_dweight && !want_dbias) return out;

  const Rows x_rows = as_rows(x), dy_rows = as_rows(dy), dsum_rows = dsum && want_dx ? as_rows(*dsum) : Rows{};
  const int64_t width = x_rows.width;
  NormBackward params{.dtype = dtype,
                      .rows = x_rows.rows,
                      .width = width,
                      .block_rows = block_rows(x_rows.rows),
                      .dy = dy_rows.data,
                      .dy_stride = dy_rows.stride,
                      .x = x_rows.data,
                      .x_stride = x_rows.stride,
                      .weight = w.data,
                      .mean = static_cast<const float*>(mean_vector.data),
                      .rstd = static_cast<const float*>(rstd_vector.data),
                      .dsum = dsum_rows.data,
                      .dsum_stride = dsum_rows.stride,
                      .stream = int64_t(x.numel() * x.element_size()) >= kStreamBytes};
  const int64_t blocks = (params.rows + params.block_rows - 1) / params.block_rows;
  OptionalTensor dweight, dbias;
  if (want_dx) {
    out.dx = allocate_like(x);
    params.dx = out.dx.mutable_data_ptr();
  }
  if (want_dweight) {
    dweight = empty_partial(x, blocks, width);
    params.dweight = dweight->mutable_data_ptr<float>();
  }
  if (want_dbias) {
    dbias = empty_partial(x, blocks, width);
    params.dbias = dbias->mutable_data_ptr<float>();
  }
  const auto& kernels = DLOPS_KERNELS(norm_kernels);
  parallel(width ? blocks : 0, params.block_rows * width, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(2 * width);
    kernels.backward(params, begin, end, scratch.data());
  });
  if (dweight) out.dweight = column_sum(x, dtype, *dweight);
  if (dbias) out.dbias = column_sum(x, dtype, *dbias);
  return out;
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const OptionalTensor& weight, double eps) {
  Forward out = forward(x, nullptr, weight, std::nullopt, eps, false);
  return {out.y, out.rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                                              double eps) {
  Forward out = forward(x, nullptr, weight, bias, eps, true);
  return {out.y, *out.mean, out.rstd};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const OptionalTensor& weight,
                                                double eps) {
  Forward out = forward(x, &residual, weight, std::nullopt, eps, false);
  return {out.y, out.sum, out.rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm(const Tensor& x, const Tensor& residual,
                                                          const OptionalTensor& weight, const OptionalTensor& bias,
                                                          double eps) {
  Forward out = forward(x, &residual, weight, bias, eps, true);
  return {out.y, out.sum, *out.mean, out.rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& dy, const Tensor& x, const OptionalTensor& weight,
                                             const Tensor& rstd, const OptionalTensor& dsum,
                                             std::vector<bool> output_mask) {
  Backward out = backward(dy, x, weight, nullptr, rstd, dsum, output_mask);
  return {out.dx, out.dweight};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& dy, const Tensor& x, const OptionalTensor& weight,
                                                       const Tensor& mean, const Tensor& rstd,
                                                       const OptionalTensor& dsum, std::vector<bool> output_mask) {
  Backward out = backward(dy, x, weight, &mean, rstd, dsum, output_mask);
  return {out.dx, out.dweight, out.dbias};
}

}  // namespace
}  // namespace dlops

STABLE_TORCH_LIBRARY_FRAGMENT(dlops_cpu, m) {
  m.def("rms_norm(Tensor x, Tensor? weight, float eps) -> (Tensor, Tensor)");
  m.def(
      "rms_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor rstd, Tensor? dsum, bool[2] output_mask)"
      " -> (Tensor, Tensor)");
  m.def("layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)");
  m.def(
      "layer_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, Tensor? dsum,"
      " bool[3] output_mask) -> (Tensor, Tensor, Tensor)");
  m.def("add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps) -> (Tensor, Tensor, Tensor)");
  m.def(
      "add_layer_norm(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
}

// For every device, so that a tensor of the wrong one is refused by name rather than by torch's dispatcher.
STABLE_TORCH_LIBRARY_IMPL(dlops_cpu, CompositeExplicitAutograd, m) {
  m.impl("rms_norm", TORCH_BOX(&dlops::rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&dlops::rms_norm_backward));
  m.impl("layer_norm", TORCH_BOX(&dlops::layer_norm));
  m.impl("layer_norm_backward", TORCH_BOX(&dlops::layer_norm_backward));
  m.impl("add_rms_norm", TORCH_BOX(&dlops::add_rms_norm));
  m.impl("add_layer_norm", TORCH_BOX(&dlops::add_layer_norm));
}
