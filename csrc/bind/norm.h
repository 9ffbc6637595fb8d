// The norm ops, on any Device: a struct with
//   kType                            its DeviceType
//   Guard(x)                         makes x's device the current one while it lives
//   norm_forward(x, params)          runs the kernel; x is any tensor on the device
//   norm_backward(x, params)
//   norm_block_rows(params)          the block_rows that norm_backward wants
//   column_sum(x, params)
//   kStreamBytes                     outputs of at least so many bytes are written past the caches
#pragma once

#include <tuple>

#include "bind/column_sum.h"
#include "core/norm.h"

namespace dlops {

template <class Device>
struct NormOps {
  using OptionalTensor = std::optional<Tensor>;

  struct Forward {
    Tensor y, sum;  // sum is x's copy when there is no residual
    OptionalTensor mean;
    Tensor rstd;
  };

  static Forward forward(const Tensor& x, const Tensor* residual, const OptionalTensor& weight,
                         const OptionalTensor& bias, double eps, bool centred) {
    const Dtype dtype = check_dtype("x", x, Device::kType);
    check(x.dim() >= 1, "x: expected at least one dimension, got ", x);
    const auto sizes = x.sizes();
    if (residual) check_like("residual", *residual, x, "x", &sizes);
    const typename Device::Guard guard(x);
    const Rows rows = as_rows(x), residual_rows = residual ? as_rows(*residual) : Rows{};
    const Vector w = check_vector("weight", weight, x, rows.width);
    const Vector b = check_vector("bias", bias, x, rows.width);

    Forward out{allocate_like(x), x, std::nullopt, allocate(x, leading_sizes(x), ScalarType::Float)};
    if (residual) out.sum = allocate_like(x);
    if (centred) out.mean = allocate(x, leading_sizes(x), ScalarType::Float);
    Device::norm_forward(x, {.dtype = dtype,
                             .rows = rows.rows,
                             .width = rows.width,
                             .x = rows.data,
                             .x_stride = rows.stride,
                             .residual = residual_rows.data,
                             .residual_stride = residual_rows.stride,
                             .sum = residual ? out.sum.mutable_data_ptr() : nullptr,
                             .weight = w.data,
                             .bias = b.data,
                             .eps = float(eps),
                             .y = out.y.mutable_data_ptr(),
                             .mean = centred ? out.mean->template mutable_data_ptr<float>() : nullptr,
                             .rstd = out.rstd.template mutable_data_ptr<float>(),
                             .stream = streams<Device>(x)});
    return out;
  }

  struct Backward {
    Tensor dx, dweight, dbias;
  };

  static Backward backward(const Tensor& dy, const Tensor& x, const OptionalTensor& weight, const Tensor* mean,
                           const Tensor& rstd, const OptionalTensor& dsum, const std::vector<bool>& output_mask) {
    const size_t outputs = mean ? 3 : 2;
    check(output_mask.size() == outputs, "output_mask: expected ", outputs, " values, got ", output_mask.size());
    const Dtype dtype = check_dtype("x", x, Device::kType);
    check(x.dim() >= 1, "x: expected at least one dimension, got ", x);
    const auto sizes = x.sizes();
    check_like("dy", dy, x, "x", &sizes);
    if (dsum) check_like("dsum", *dsum, x, "x", &sizes);
    const typename Device::Guard guard(x);
    const Vector rstd_vector = check_statistic("rstd", rstd, x);
    const Vector mean_vector = mean ? check_statistic("mean", *mean, x) : Vector{};
    const Vector w = check_vector("weight", weight, x, x.size(x.dim() - 1));
    Backward out{absent(x), absent(x), absent(x)};
    const bool want_dx = output_mask[0], want_dweight = output_mask[1], want_dbias = mean && output_mask[2];
    if (!want_dx && !want_dweight && !want_dbias) return out;

    const Rows x_rows = as_rows(x), dy_rows = as_rows(dy), dsum_rows = dsum && want_dx ? as_rows(*dsum) : Rows{};
    NormBackward params{.dtype = dtype,
                        .rows = x_rows.rows,
                        .width = x_rows.width,
                        .dy = dy_rows.data,
                        .dy_stride = dy_rows.stride,
                        .x = x_rows.data,
                        .x_stride = x_rows.stride,
                        .weight = w.data,
                        .mean = static_cast<const float*>(mean_vector.data),
                        .rstd = static_cast<const float*>(rstd_vector.data),
                        .dsum = dsum_rows.data,
                        .dsum_stride = dsum_rows.stride,
                        .stream = streams<Device>(x)};
    params.block_rows = Device::norm_block_rows(params);
    const PartialSums<Device> dweight(x, dtype, params, want_dweight), dbias(x, dtype, params, want_dbias);
    params.dweight = dweight.data();
    params.dbias = dbias.data();
    if (want_dx) {
      out.dx = allocate_like(x);
      params.dx = out.dx.mutable_data_ptr();
    }
    Device::norm_backward(x, params);
    out.dweight = dweight.total(x);
    out.dbias = dbias.total(x);
    return out;
  }

  static std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const OptionalTensor& weight, double eps) {
    Forward out = forward(x, nullptr, weight, std::nullopt, eps, false);
    return {out.y, out.rstd};
  }

  static std::tuple<Tensor, Tensor, Tensor> layer_norm(const Tensor& x, const OptionalTensor& weight,
                                                       const OptionalTensor& bias, double eps) {
    Forward out = forward(x, nullptr, weight, bias, eps, true);
    return {out.y, *out.mean, out.rstd};
  }

  static std::tuple<Tensor, Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual,
                                                         const OptionalTensor& weight, double eps) {
    Forward out = forward(x, &residual, weight, std::nullopt, eps, false);
    return {out.y, out.sum, out.rstd};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm(const Tensor& x, const Tensor& residual,
                                                                   const OptionalTensor& weight,
                                                                   const OptionalTensor& bias, double eps) {
    Forward out = forward(x, &residual, weight, bias, eps, true);
    return {out.y, out.sum, *out.mean, out.rstd};
  }

  static std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& dy, const Tensor& x, const OptionalTensor& weight,
                                                      const Tensor& rstd, const OptionalTensor& dsum,
                                                      std::vector<bool> output_mask) {
    Backward out = backward(dy, x, weight, nullptr, rstd, dsum, output_mask);
    return {out.dx, out.dweight};
  }

  static std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& dy, const Tensor& x,
                                                                const OptionalTensor& weight, const Tensor& mean,
                                                                const Tensor& rstd, const OptionalTensor& dsum,
                                                                std::vector<bool> output_mask) {
    Backward out = backward(dy, x, weight, &mean, rstd, dsum, output_mask);
    return {out.dx, out.dweight, out.dbias};
  }

  static void define(StableLibrary& m) {
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

  static void implement(StableLibrary& m) {
    m.impl("rms_norm", TORCH_BOX(&NormOps::rms_norm));
    m.impl("rms_norm_backward", TORCH_BOX(&NormOps::rms_norm_backward));
    m.impl("layer_norm", TORCH_BOX(&NormOps::layer_norm));
    m.impl("layer_norm_backward", TORCH_BOX(&NormOps::layer_norm_backward));
    m.impl("add_rms_norm", TORCH_BOX(&NormOps::add_rms_norm));
    m.impl("add_layer_norm", TORCH_BOX(&NormOps::add_layer_norm));
  }
};

}  // namespace dlops
