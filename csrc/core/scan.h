// The selective scan: what csrc/bind passes to its kernels. Strides are in elements; float is the state's type, in
// pairs (re, im) where A is complex.
#pragma once

#include "core/dtype.h"

namespace dlops {

struct ScanTensor {  // (batch, dim, steps), any strides
  const void* data = nullptr;
  int64_t batch = 0, channel = 0, step = 0;
};

struct ScanOutput {
  void* data = nullptr;
  int64_t batch = 0, channel = 0, step = 0;
};

struct ScanCoefficient {  // B or C
  const void* data;
  bool varies;                        // else (dim, states) contiguous, of the state's type
  int64_t batch, group, state, step;  // if it varies: (batch, groups, states, steps), pairs where complex
};

struct Scan {
  Dtype dtype;  // of u, delta, z, y, and B and C where they vary and are real
  bool complex;
  int64_t batch, dim, states, steps, groups;
  int64_t block;  // channels of a task, all of one group
  int64_t chunk;  // steps from one checkpoint to the next, a multiple of 64
  ScanTensor u, delta, z;
  const float* A;  // (dim, states) contiguous
  ScanCoefficient B, C;
  const float *D, *delta_bias;  // (dim) or null
  bool delta_softplus;
  const int32_t* cu_seqlens;  // (sequences + 1), or null: every batch element is a sequence
  int64_t sequences;
  const float* initial_state;  // (sequences, dim, states) contiguous, or null

  DLOPS_HD int64_t chunks() const { return (steps + chunk - 1) / chunk; }
  DLOPS_HD int64_t blocks() const { return (dim / groups + block - 1) / block; }  // of a group
  int64_t tasks() const { return dim ? batch * groups * blocks() : 0; }
};

struct ScanForward : Scan {
  ScanOutput y;
  float* last_state;   // (sequences, dim, states)
  float* checkpoints;  // (batch, ceil(steps / chunk), dim, states) or null
};

struct ScanBackward : Scan {
  ScanTensor dy;
  const float* dlast_state;  // (sequences, dim, states) or null
  const float* checkpoints;
  ScanOutput du, ddelta, dz;  // data null where not asked for
  // Partial sums, null where not asked for. Those of B and C that vary, by block: (blocks, batch, groups, steps,
  // states); those of all parameters by batch element: (batch, dim, states), (batch, dim).
  float *dA, *dB, *dC, *dD, *ddelta_bias;
  float* dinitial_state;  // (sequences, dim, states) or null
};

}  // namespace dlops
