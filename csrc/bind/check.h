// What every binding needs: argument checks that name the argument, row views without copies, output allocation.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/dtype.h"

namespace dlops {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::detail::StableLibrary;

struct Shape {
  std::vector<int64_t> sizes;
};
std::ostream& operator<<(std::ostream& out, const Shape& shape);
std::ostream& operator<<(std::ostream& out, const Tensor& tensor);  // "a float64 cpu tensor of shape (3, 4)"

// Raises RuntimeError with the parts as its message unless ok.
template <class... Parts>
void check(bool ok, const Parts&... parts) {
  if (ok) [[likely]]
    return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// The kernels' dtype of a strided float32, bfloat16 or float16 tensor on `device`.
Dtype check_dtype(const char* name, const Tensor& tensor, DeviceType device);

// `tensor` has the dtype, the device and, unless sizes is null, the shape asked for; `like` names where they come from.
void check_like(const char* name, const Tensor& tensor, const Tensor& like, const char* like_name,
                const torch::headeronly::IntHeaderOnlyArrayRef* sizes);

// A (D) parameter, contiguous; null when absent.
struct Vector {
  std::optional<Tensor> tensor;  // keeps the data alive
  const void* data = nullptr;
};
Vector check_vector(const char* name, const std::optional<Tensor>& tensor, const Tensor& x, int64_t width);

// Per-row float32 statistics saved by a forward: shape x.shape[:-1], contiguous.
Vector check_statistic(const char* name, const Tensor& tensor, const Tensor& x);

// A tensor seen as (rows, width): rows `stride` elements apart, unit stride inside; copied only if it is not that.
struct Rows {
  std::optional<Tensor> tensor;
  const void* data = nullptr;
  int64_t rows = 0, width = 0, stride = 0;
};
Rows as_rows(const Tensor& tensor);

// Uninitialised contiguous tensors on x's device.
Tensor allocate(const Tensor& x, const std::vector<int64_t>& sizes, ScalarType dtype);
Tensor allocate_like(const Tensor& x);
Tensor absent(const Tensor& x);  // shape (0,), x's dtype: an output nobody asked for

std::vector<int64_t> leading_sizes(const Tensor& x);  // x.shape[:-1]

}  // namespace dlops
