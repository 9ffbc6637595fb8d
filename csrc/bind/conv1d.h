// The causal convolution, on any Device: a struct with
//   kType                              its DeviceType
//   Guard(x)                           makes x's device the current one while it lives
//   conv1d_forward(x, params)          runs the kernel; x is any tensor on the device
//   conv1d_backward(x, params)
//   conv1d_partial_sums(params)        the blocks that conv1d_backward wants
//   conv1d_scratch(params)             the floats of scratch memory that it wants
//   column_sum(x, params)
#pragma once

#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "bind/check.h"
#include "core/column_sum.h"
#include "core/conv1d.h"

namespace dlops {

template <class Device>
class Conv1dOps {
  using OptionalTensor = std::optional<Tensor>;

  // What the params point to, where it had to be copied.
  std::vector<Tensor> held_;
  const typename Device::Guard guard_;

  explicit Conv1dOps(const Tensor& x) : guard_(x) {}

  const void* dense(const char* name, const OptionalTensor& tensor, const Tensor& x, ScalarType dtype,
                    const std::vector<int64_t>& sizes) {
    if (!tensor) return nullptr;
    const auto found = tensor->sizes();
    check(std::vector<int64_t>(found.begin(), found.end()) == sizes && tensor->scalar_type() == dtype &&
              tensor->device() == x.device(),
          name, ": expected shape ", Shape{sizes}, " on x's device, of the dtype that the op asks for, got ", *tensor);
    held_.push_back(tensor->is_contiguous() ? *tensor : torch::stable::contiguous(*tensor));
    return held_.back().const_data_ptr();
  }

  // A signal in the layout that the kernels were told of; copied where it is in another.
  Signal<const void*> signal(const Tensor& tensor, bool channels_last) {
    const int unit = channels_last ? 1 : 2;
    Tensor x = tensor;
    if (x.size(unit) > 1 && x.stride(unit) != 1)
      x = channels_last ? transposed(torch::stable::contiguous(transposed(x))) : torch::stable::contiguous(x);
    held_.push_back(x);
    return {x.const_data_ptr(), x.stride(0), channels_last ? 1 : x.stride(1), channels_last ? x.stride(2) : 1};
  }

  static Tensor transposed(const Tensor& x) { return torch::stable::transpose(x, 1, 2); }

  static std::pair<Tensor, Signal<void*>> allocate_signal(const Tensor& x, bool channels_last) {
    const int64_t batch = x.size(0), channels = x.size(1), steps = x.size(2);
    Tensor y = channels_last ? transposed(allocate(x, {batch, steps, channels}, x.scalar_type()))
                             : allocate(x, {batch, channels, steps}, x.scalar_type());
    return {y, {y.mutable_data_ptr(), channels * steps, channels_last ? 1 : steps, channels_last ? channels : 1}};
  }

  Conv1d arguments(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& initial,
                   const OptionalTensor& seq_idx, const OptionalTensor& cu_seqlens, const std::string& activation,
                   int64_t dilation) {
    Conv1d p{.dtype = check_dtype("x", x, Device::kType)};
    p.weight_dtype = check_dtype("weight", weight, Device::kType);
    check(x.dim() == 3, "x: expected (batch, dim, seqlen), got ", x);
    check(weight.dim() == 2 && weight.size(1) > 0, "weight: expected (dim, width), got ", weight);
    check(dilation > 0, "dilation: expected a positive number, got ", dilation);
    check(activation == "none" || activation == "silu", "activation: expected none or silu, got ", activation);
    p.sequences = x.size(0), p.channels = x.size(1), p.seqlen = x.size(2), p.width = weight.size(1);
    p.dilation = dilation, p.reach = (p.width - 1) * dilation, p.silu = activation == "silu";
    p.channels_last = x.stride(1) == 1 && x.stride(2) != 1;
    if (cu_seqlens) {
      check(p.sequences == 1 && !seq_idx, "x: expected batch 1 and no seq_idx with cu_seqlens, got ", x);
      check(cu_seqlens->dim() == 1 && cu_seqlens->size(0) > 0, "cu_seqlens: expected (num_sequences + 1,), got ",
            *cu_seqlens);
      p.sequences = cu_seqlens->size(0) - 1;
      p.bounds = static_cast<const int32_t*>(dense("cu_seqlens", cu_seqlens, x, ScalarType::Int, {p.sequences + 1}));
    }
    p.seq_idx = static_cast<const int32_t*>(dense("seq_idx", seq_idx, x, ScalarType::Int, {p.sequences, p.seqlen}));
    p.x = signal(x, p.channels_last);
    p.weight = dense("weight", weight, x, weight.scalar_type(), {p.channels, p.width});
    p.bias = dense("bias", bias, x, weight.scalar_type(), {p.channels});
    p.initial = dense("initial_states", initial, x, x.scalar_type(), {p.sequences, p.channels, p.reach});
    return p;
  }

  // The partial sums of a gradient shaped like `like`, where it is asked for.
  static OptionalTensor partial_sums(const Tensor& like, int64_t blocks, bool wanted) {
    if (!wanted) return std::nullopt;
    return allocate(like, {blocks, int64_t(like.numel())}, ScalarType::Float);
  }

  static Tensor total(const Tensor& x, const Tensor& like, const OptionalTensor& partial, Dtype dtype) {
    if (!partial) return absent(x);
    Tensor out = allocate_like(like);
    Device::column_sum(
        x, {dtype, partial->size(0), partial->size(1), partial->const_data_ptr<float>(), out.mutable_data_ptr()});
    return out;
  }

  static std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                            const OptionalTensor& initial, const OptionalTensor& seq_idx,
                                            const OptionalTensor& cu_seqlens, std::string activation, int64_t dilation,
                                            bool return_final_states) {
    Conv1dOps held(x);
    Conv1dForward p{held.arguments(x, weight, bias, initial, seq_idx, cu_seqlens, activation, dilation)};
    auto [y, out] = allocate_signal(x, p.channels_last);
    p.y = out;
    Tensor final = absent(x);
    if (return_final_states) {
      final = allocate(x, {p.sequences, p.channels, p.reach}, x.scalar_type());
      p.final = final.mutable_data_ptr();
    }
    Device::conv1d_forward(x, p);
    return {y, final};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                                             const OptionalTensor& bias, const OptionalTensor& initial,
                                                             const OptionalTensor& seq_idx,
                                                             const OptionalTensor& cu_seqlens,
                                                             const OptionalTensor& dfinal, std::string activation,
                                                             int64_t dilation, std::vector<bool> output_mask) {
    check(output_mask.size() == 4, "output_mask: expected 4 values, got ", output_mask.size());
    Conv1dOps held(x);
    Conv1dBackward p{held.arguments(x, weight, bias, initial, seq_idx, cu_seqlens, activation, dilation)};
    const auto sizes = x.sizes();
    check_like("dy", dy, x, "x", &sizes);
    p.dy = held.signal(dy, p.channels_last);
    const std::vector<int64_t> states{p.sequences, p.channels, p.reach};
    p.dfinal = held.dense("dfinal_states", dfinal, x, x.scalar_type(), states);
    Tensor dx = absent(x), dinitial = absent(x);
    if (output_mask[0]) std::tie(dx, p.dx) = allocate_signal(x, p.channels_last);
    if (output_mask[3]) {
      dinitial = allocate(x, states, x.scalar_type());
      p.dinitial = dinitial.mutable_data_ptr();
    }
    p.blocks = Device::conv1d_partial_sums(p);
    const Tensor per_channel = allocate(weight, {p.channels}, weight.scalar_type());
    const OptionalTensor dweight = partial_sums(weight, p.blocks, output_mask[1]);
    const OptionalTensor dbias = partial_sums(per_channel, p.blocks, output_mask[2]);
    if (dweight) p.dweight = dweight->template mutable_data_ptr<float>();
    if (dbias) p.dbias = dbias->template mutable_data_ptr<float>();
    if (const int64_t floats = Device::conv1d_scratch(p))
      p.scratch = held.held_.emplace_back(allocate(x, {floats}, ScalarType::Float)).template mutable_data_ptr<float>();
    Device::conv1d_backward(x, p);
    return {dx, total(x, weight, dweight, p.weight_dtype), total(x, per_channel, dbias, p.weight_dtype), dinitial};
  }

 public:
  static void define(StableLibrary& m) {
    m.def(
        "causal_conv1d(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_states, Tensor? seq_idx,"
        " Tensor? cu_seqlens, str activation, int dilation, bool return_final_states) -> (Tensor, Tensor)");
    m.def(
        "causal_conv1d_backward(Tensor dy, Tensor x, Tensor weight, Tensor? bias, Tensor? initial_states,"
        " Tensor? seq_idx, Tensor? cu_seqlens, Tensor? dfinal_states, str activation, int dilation,"
        " bool[4] output_mask) -> (Tensor, Tensor, Tensor, Tensor)");
  }

  static void implement(StableLibrary& m) {
    m.impl("causal_conv1d", TORCH_BOX(&Conv1dOps::forward));
    m.impl("causal_conv1d_backward", TORCH_BOX(&Conv1dOps::backward));
  }
};

}  // namespace dlops
