// Sums over a batch, in two stages: blocks of rows leave partial sums, which are added up in the output's dtype.
#pragma once

#include "bind/check.h"
#include "core/column_sum.h"

namespace dlops {

// Whether what has x's size is written past the caches: the next reader would not find it there anyway.
template <class Device>
bool streams(const Tensor& x) {
  return int64_t(x.numel() * x.element_size()) >= Device::kStreamBytes;
}

// Partial sums for a (width) gradient, where it is asked for.
template <class Device>
class PartialSums {
 public:
  template <class Params>  // with rows, width and block_rows
  PartialSums(const Tensor& x, Dtype dtype, const Params& params, bool wanted) {
    if (!wanted) return;
    const int64_t blocks = (params.rows + params.block_rows - 1) / params.block_rows;
    partial_ = allocate(x, {blocks, params.width}, ScalarType::Float);
    sum_ = {dtype, blocks, params.width, partial_->const_data_ptr<float>(), nullptr};
  }

  float* data() const { return partial_ ? partial_->mutable_data_ptr<float>() : nullptr; }

  // Their sum, once a kernel has filled them in.
  Tensor total(const Tensor& x) const {
    if (!partial_) return absent(x);
    Tensor out = allocate(x, {sum_.width}, x.scalar_type());
    ColumnSum params = sum_;
    params.out = out.mutable_data_ptr();
    Device::column_sum(x, params);
    return out;
  }

 private:
  std::optional<Tensor> partial_;
  ColumnSum sum_{};
};

}  // namespace dlops
