// What the bindings of the scans share: arguments as the kernels take them, tasks with scratch memory.
#pragma once

#include "bind/cpu.h"
#include "cpu/column_sum.h"
#include "cpu/scan.h"

namespace dlops {

using OptionalTensor = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline void check_exact(const char* name, const Tensor& tensor, ScalarType dtype, const Sizes& sizes,
                        DeviceType device = DeviceType::CPU) {
  bool same = tensor.dim() == int64_t(sizes.size());
  for (size_t i = 0; same && i < sizes.size(); ++i) same = tensor.size(int64_t(i)) == sizes[i];
  check(same && tensor.scalar_type() == dtype && tensor.device().type() == device, name, ": expected shape ",
        Shape{sizes}, " on the other arguments' device, of the state's or the input's dtype, got ", tensor);
}

// Contiguous copies of what the kernels take as plain pointers.
struct Held {
  std::vector<Tensor> tensors;
  template <class T>
  const T* data(const Tensor& tensor) {
    tensors.push_back(tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor));
    return static_cast<const T*>(tensors.back().const_data_ptr());
  }
};

inline const float* parameter(Held& held, const char* name, const OptionalTensor& tensor, ScalarType dtype,
                              const Sizes& sizes, DeviceType device = DeviceType::CPU) {
  if (!tensor) return nullptr;
  check_exact(name, *tensor, dtype, sizes, device);
  return held.data<float>(*tensor);
}

// Of packed sequences: (num_sequences + 1) numbers that do not leave [0, steps]; `readable`: to the host.
inline const int32_t* bounds(Held& held, const Tensor& cu_seqlens, int64_t steps, DeviceType device = DeviceType::CPU,
                             bool readable = true) {
  check(cu_seqlens.dim() == 1 && cu_seqlens.size(0) > 0, "cu_seqlens: expected (num_sequences + 1,), got ", cu_seqlens);
  const int64_t sequences = cu_seqlens.size(0) - 1;
  check_exact("cu_seqlens", cu_seqlens, ScalarType::Int, {sequences + 1}, device);
  const int32_t* edges = held.data<int32_t>(cu_seqlens);
  if (!readable) return edges;
  bool ok = edges[0] == 0 && edges[sequences] == steps;
  for (int64_t i = 0; i < sequences; ++i) ok &= edges[i] <= edges[i + 1];
  check(ok, "cu_seqlens: expected numbers that do not decrease, from 0 to ", steps);
  return edges;
}

inline ScanTensor view(const Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

inline ScanOutput output(Tensor& x) { return {x.mutable_data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

// Shaped like x; channels last in memory if x is.
inline Tensor allocate_steps(const Tensor& x) {
  const int64_t batch = x.size(0), dim = x.size(1), steps = x.size(2);
  if (x.stride(1) == 1 && x.stride(2) != 1)
    return torch::stable::transpose(allocate(x, {batch, steps, dim}, x.scalar_type()), 1, 2);
  return allocate(x, {batch, dim, steps}, x.scalar_type());
}

// f(begin, end, scratch) over the tasks on torch's threads; elements is the work of one task.
template <class F>
void run_tasks(int64_t tasks, int64_t elements, int64_t scratch, const F& f) {
  parallel(tasks, elements, [&](int64_t begin, int64_t end) {
    constexpr int64_t kAlign = 64;
    std::vector<float> memory(scratch + kAlign / sizeof(float));
    float* aligned = memory.data() + (kAlign - uintptr_t(memory.data()) % kAlign) % kAlign / sizeof(float);
    f(begin, end, aligned);
  });
}

// A gradient that is summed from partial ones: (count, *sizes) of floats, pairs where complex.
struct PartialSums {
  std::optional<Tensor> memory;
  int64_t count = 0, width = 0;
  float* data = nullptr;

  PartialSums() = default;
  PartialSums(const Tensor& like, int64_t count, int64_t width)
      : memory(allocate(like, {count, width}, ScalarType::Float)), count(count), width(width) {
    data = memory->mutable_data_ptr<float>();
  }

  void sum_into(Tensor& out, Dtype dtype) const {
    const ColumnSum params{dtype, count, width, data, out.mutable_data_ptr()};
    const auto& kernels = DLOPS_KERNELS(column_sum_kernels);
    constexpr int64_t kColumns = 64;  // the kernel's tile
    parallel(ceil_div(width, kColumns), kColumns * count, [&](int64_t begin, int64_t end) {
      kernels.column_sum(params, begin * kColumns, std::min(end * kColumns, width));
    });
  }
};

}  // namespace dlops
