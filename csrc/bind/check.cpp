#include "bind/check.h"

#include <torch/csrc/stable/ops.h>

namespace dlops {

namespace {

using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

Shape shape_of(Sizes sizes) { return {std::vector<int64_t>(sizes.begin(), sizes.end())}; }

bool same(Sizes a, Sizes b) {
  if (a.size() != b.size()) return false;
  for (size_t i = 0; i < a.size(); ++i)
    if (a[i] != b[i]) return false;
  return true;
}

std::string name_of(DeviceType device) {
  switch (device) {
    case DeviceType::CPU: return "cpu";
    case DeviceType::CUDA: return "cuda";
    case DeviceType::Meta: return "meta";
    default: return "device type " + std::to_string(int(device));
  }
}

std::string name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Double: return "float64";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    default: return "dtype " + std::to_string(int(dtype));
  }
}

void check_strided(const char* name, const Tensor& tensor) {
  check(tensor.defined(), name, ": got an undefined tensor");
  check(tensor.layout() == torch::headeronly::Layout::Strided, name, ": expected a dense (strided) tensor");
}

}  // namespace

std::ostream& operator<<(std::ostream& out, const Shape& shape) {
  out << '(';
  for (size_t i = 0; i < shape.sizes.size(); ++i) out << (i ? ", " : "") << shape.sizes[i];
  return out << (shape.sizes.size() == 1 ? ",)" : ")");
}

std::ostream& operator<<(std::ostream& out, const Tensor& tensor) {
  return out << "a " << name_of(tensor.scalar_type()) << ' ' << name_of(tensor.device().type()) << " tensor of shape "
             << shape_of(tensor.sizes());
}

Dtype check_dtype(const char* name, const Tensor& tensor, DeviceType device) {
  check_strided(name, tensor);
  check(tensor.device().type() == device, name, ": expected a ", name_of(device), " tensor, got ", tensor);
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat32;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Half: return Dtype::kFloat16;
    default: check(false, name, ": expected float32, bfloat16 or float16, got ", tensor);
  }
  return {};
}

void check_like(const char* name, const Tensor& tensor, const Tensor& like, const char* like_name, const Sizes* sizes) {
  check_strided(name, tensor);
  check(tensor.scalar_type() == like.scalar_type() && tensor.device() == like.device(), name, ": expected dtype ",
        name_of(like.scalar_type()), " and device ", name_of(like.device().type()), " like ", like_name, ", got ",
        tensor);
  if (sizes) check(same(tensor.sizes(), *sizes), name, ": expected shape ", shape_of(*sizes), ", got ", tensor);
}

Vector check_vector(const char* name, const std::optional<Tensor>& tensor, const Tensor& x, int64_t width) {
  if (!tensor) return {};
  const Sizes sizes(&width, 1);
  check_like(name, *tensor, x, "x", &sizes);
  Tensor dense = tensor->is_contiguous() ? *tensor : torch::stable::contiguous(*tensor);
  return {dense, dense.const_data_ptr()};
}

Vector check_statistic(const char* name, const Tensor& tensor, const Tensor& x) {
  check_strided(name, tensor);
  const Sizes sizes(x.sizes().data(), x.sizes().size() - 1);
  check(tensor.scalar_type() == ScalarType::Float && tensor.device() == x.device() && same(tensor.sizes(), sizes), name,
        ": expected float32 of shape ", shape_of(sizes), " on x's device, got ", tensor);
  Tensor dense = tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
  return {dense, dense.const_data_ptr()};
}

Rows as_rows(const Tensor& tensor) {
  const Sizes sizes = tensor.sizes(), strides = tensor.strides();
  const int64_t last = int64_t(sizes.size()) - 1;
  Rows view{tensor, nullptr, 1, sizes[last], sizes[last]};
  bool collapses = sizes[last] <= 1 || strides[last] == 1;
  for (int64_t d = last - 1; d >= 0; --d) {
    if (sizes[d] != 1) {
      if (view.rows == 1)
        view.stride = strides[d];
      else
        collapses &= strides[d] == view.rows * view.stride;
    }
    view.rows *= sizes[d];
  }
  if (!collapses && view.rows * view.width > 0) {
    view.tensor = torch::stable::contiguous(tensor);
    view.stride = view.width;
  }
  view.data = view.tensor->const_data_ptr();
  return view;
}

Tensor allocate(const Tensor& x, const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= sizes[d] > 1 ? sizes[d] : 1;
  }
  int32_t device_type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device_type));
  const int32_t shim_dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(),
                                                         shim_dtype, device_type, x.get_device_index(), &handle));
  return Tensor(handle);
}

Tensor allocate_like(const Tensor& x) { return allocate(x, shape_of(x.sizes()).sizes, x.scalar_type()); }

Tensor absent(const Tensor& x) { return allocate(x, {0}, x.scalar_type()); }

std::vector<int64_t> leading_sizes(const Tensor& x) {
  const Sizes sizes = x.sizes();
  return {sizes.begin(), sizes.end() - 1};
}

}  // namespace dlops
