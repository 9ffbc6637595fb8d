// dlops_cuda (dlops_simt): normalisation of the last dimension.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "bind/cuda.h"
#include "cuda/norm.h"

namespace dlops {
namespace {

using OptionalTensor = std::optional<Tensor>;

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const OptionalTensor& weight, double eps) {
  const Dtype dtype = check_dtype("x", x, kDevice);
  check(x.dim() >= 1, "x: expected at least one dimension, got ", x);
  const DeviceGuard guard(x);
  const Rows rows = as_rows(x);
  const Vector w = check_vector("weight", weight, x, rows.width);
  Tensor y = allocate_like(x);
  Tensor rstd = allocate(x, leading_sizes(x), ScalarType::Float);
  const RmsNormForward params{.dtype = dtype,
                              .rows = rows.rows,
                              .width = rows.width,
                              .x = rows.data,
                              .x_stride = rows.stride,
                              .weight = w.data,
                              .eps = float(eps),
                              .y = y.mutable_data_ptr(),
                              .rstd = rstd.mutable_data_ptr<float>()};
  check_launch("rms_norm", cuda::rms_norm_forward(params, current_stream(x)));
  return {y, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& dy, const Tensor& x, const OptionalTensor& weight,
                                             const Tensor& rstd, const OptionalTensor& dsum,
                                             std::vector<bool> output_mask) {
  check(output_mask.size() == 2, "output_mask: expected 2 values, got ", output_mask.size());
  const Dtype dtype = check_dtype("x", x, kDevice);
  check(x.dim() >= 1, "x: expected at least one dimension, got ", x);
  const auto sizes = x.sizes();
  check_like("dy", dy, x, "x", &sizes);
  if (dsum) check_like("dsum", *dsum, x, "x", &sizes);
  const DeviceGuard guard(x);
  const Vector rstd_vector = check_statistic("rstd", rstd, x);
  const Vector w = check_vector("weight", weight, x, x.size(x.dim() - 1));
  Tensor dx = absent(x), dweight = absent(x);
  if (!output_mask[0] && !output_mask[1]) return {dx, dweight};

  const Rows x_rows = as_rows(x), dy_rows = as_rows(dy), dsum_rows = dsum && output_mask[0] ? as_rows(*dsum) : Rows{};
  if (output_mask[0]) dx = allocate_like(x);
  if (output_mask[1]) dweight = allocate(x, {x_rows.width}, x.scalar_type());
  RmsNormBackward params{.dtype = dtype,
                         .rows = x_rows.rows,
                         .width = x_rows.width,
                         .dy = dy_rows.data,
                         .dy_stride = dy_rows.stride,
                         .x = x_rows.data,
                         .x_stride = x_rows.stride,
                         .weight = w.data,
                         .rstd = static_cast<const float*>(rstd_vector.data),
                         .dsum = dsum_rows.data,
                         .dsum_stride = dsum_rows.stride,
                         .dx = output_mask[0] ? dx.mutable_data_ptr() : nullptr,
                         .partial = nullptr,
                         .dweight = output_mask[1] ? dweight.mutable_data_ptr() : nullptr};
  OptionalTensor partial;
  if (output_mask[1]) {
    // At least one row: torch gives an empty tensor no address.
    const int64_t blocks = std::max<int64_t>(1, cuda::rms_norm_backward_blocks(params));
    partial = allocate(x, {blocks, x_rows.width}, ScalarType::Float);
    params.partial = partial->mutable_data_ptr<float>();
  }
  check_launch("rms_norm_backward", cuda::rms_norm_backward(params, current_stream(x)));
  return {dx, dweight};
}

}  // namespace
}  // namespace dlops

STABLE_TORCH_LIBRARY_FRAGMENT(DLOPS_CUDA_LIBRARY, m) {
  m.def("rms_norm(Tensor x, Tensor? weight, float eps) -> (Tensor, Tensor)");
  m.def(
      "rms_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor rstd, Tensor? dsum, bool[2] output_mask)"
      " -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(DLOPS_CUDA_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("rms_norm", TORCH_BOX(&dlops::rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&dlops::rms_norm_backward));
}
