// Decoding steps, on states that advance in place: what csrc/bind passes to their kernels. Strides are in elements.
#pragma once

#include "core/dtype.h"

namespace dlops {

constexpr int64_t kUpdateStates = 256;  // of a channel, at most

template <class Pointer>
struct Strided {  // (batch, heads, channels), (batch, groups, states), (batch, channels, steps); a state has a fourth
  Pointer data = nullptr;
  int64_t stride[4] = {};
};

struct ScanUpdate {
  Dtype dtype;        // of x, dt, z, B, C and y
  Dtype state_dtype;  // that, or float32
  int64_t batch, heads, channels, states, groups;
  Strided<const void*> x, dt, z, B, C;  // z without data where there is none
  Strided<const float*> A;              // (heads, channels, states): next to each other, or all the same
  Strided<const float*> D, dt_bias;     // (1, heads, channels) or without data
  bool dt_softplus;
  Strided<void*> state;  // (entries, heads, channels, states)
  int64_t entries;
  const int32_t* indices;  // (batch) entries, negative: none and y is 0; or null: element i has entry i
  Strided<void*> y;
};

struct ConvUpdate {
  Dtype dtype, weight_dtype, bias_dtype;
  int64_t batch, channels, steps, width, dilation, state_len;
  Strided<const void*> x;
  Strided<const void*> weight;  // (1, channels, width)
  const void* bias;             // (channels) or null
  bool silu;
  Strided<void*> state;  // (entries, channels, state_len)
  int64_t entries;
  const int32_t* indices;  // as those of ScanUpdate
  const int32_t* seen;     // (batch): a circular buffer, in which step t is kept at t % state_len; or null
  Strided<void*> y;
};

inline namespace DLOPS_ISA {

template <class T, class Pointer>
DLOPS_HD T* at(const Strided<Pointer>& x, int64_t i, int64_t j, int64_t k) {
  return (T*)x.data + i * x.stride[0] + j * x.stride[1] + k * x.stride[2];
}

}  // namespace DLOPS_ISA
}  // namespace dlops
