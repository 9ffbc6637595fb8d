// Host decoding steps, on states that advance in place: what csrc/bind passes to them. Strides are in elements.
#pragma once

#include "core/dtype.h"

namespace dlops {

constexpr int64_t kUpdateChannels = 64;  // of a task; a multiple of every number of lanes
constexpr int64_t kUpdateStates = 256;   // at most

template <class Pointer>
struct Strided {  // (batch, heads, channels), (batch, groups, states) or (batch, channels, steps)
  Pointer data = nullptr;
  int64_t stride[3] = {};
};

struct ScanUpdate {
  Dtype dtype;        // of x, dt, z, B, C and y
  Dtype state_dtype;  // that, or float32
  int64_t batch, heads, channels, states, groups;
  Strided<const void*> x, dt, z, B, C;  // z without data where there is none
  Strided<const float*> A;              // (heads, channels, states): next to each other, or all the same
  Strided<const float*> D, dt_bias;     // (1, heads, channels) or without data
  bool dt_softplus;
  Strided<void*> state;    // (entries, heads, channels), of states next to each other
  const int32_t* indices;  // (batch) entries, or null: element i has entry i
  Strided<void*> y;

  int64_t blocks() const { return (channels + kUpdateChannels - 1) / kUpdateChannels; }
  int64_t tasks() const { return batch * heads * blocks(); }
};

struct ConvUpdate {
  Dtype dtype, weight_dtype, bias_dtype;
  int64_t batch, channels, steps, width, dilation, state_len;
  Strided<const void*> x;
  Strided<const void*> weight;  // (1, channels, width)
  const void* bias;             // (channels) or null
  bool silu;
  Strided<void*> state;    // (entries, channels, state_len)
  const int32_t* indices;  // (batch) entries, or null: element i has entry i
  const int32_t* seen;     // (batch): a circular buffer, in which step t is kept at t % state_len; or null
  Strided<void*> y;

  int64_t blocks() const { return (channels + kUpdateChannels - 1) / kUpdateChannels; }
  int64_t tasks() const { return batch * blocks(); }
};

struct StateUpdateKernels {
  void (*scan)(const ScanUpdate&, int64_t begin_task, int64_t end_task);
  void (*conv)(const ConvUpdate&, int64_t begin_task, int64_t end_task);
};

#define DLOPS_DECLARE(isa)                              \
  namespace isa {                                       \
  extern const StateUpdateKernels state_update_kernels; \
  }
DLOPS_FOR_EACH_ISA(DLOPS_DECLARE)
#undef DLOPS_DECLARE

}  // namespace dlops
