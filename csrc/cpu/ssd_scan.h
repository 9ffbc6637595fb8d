// Host scan of Mamba-2: what csrc/bind passes to it. Strides are in elements.
#pragma once

#include "core/dtype.h"

namespace dlops {

struct SsdTensor {  // (batch, steps, heads or groups, elements), any strides
  const void* data = nullptr;
  int64_t batch = 0, step = 0, head = 0, element = 0;
};

struct SsdScan {
  Dtype dtype;     // of x, B, C, z, y and dy
  Dtype dt_dtype;  // that, or float32
  int64_t batch, steps, heads, headdim, groups, states;
  int64_t block;  // heads of a task, all of one group
  SsdTensor x, dt, B, C, z;
  const float *A, *dt_bias;  // (heads); dt_bias or null
  const float* D;            // (heads), (heads, headdim) or null
  bool D_varies;             // within a head
  bool dt_softplus;
  float dt_min, dt_max;
  const int32_t* cu_seqlens;  // (sequences + 1), or null: every batch element is a sequence
  int64_t sequences;
  const float* initial_states;  // (sequences, heads, headdim, states) contiguous, or null

  int64_t blocks() const { return (heads / groups + block - 1) / block; }  // of a group
  int64_t tasks() const { return heads ? batch * groups * blocks() : 0; }
};

struct SsdForward : SsdScan {
  void* y;  // (batch, steps, heads, headdim) contiguous
  float* final_states;
};

struct SsdBackward : SsdScan {
  SsdTensor dy;
  const float* dfinal_states;  // or null
  // Contiguous, null where not asked for.
  void *dx, *ddt, *dz;
  float* dinitial_states;
  // Partial sums, null where not asked for: by block, (blocks, batch, steps, groups, states); by batch element, (batch,
  // heads) or, of D if it varies, (batch, heads, headdim).
  float *dB, *dC;
  float *dA, *dD, *ddt_bias;
};

struct SsdKernels {
  int64_t (*forward_scratch)(const SsdScan&);  // floats
  int64_t (*backward_scratch)(const SsdScan&);
  void (*forward)(const SsdForward&, int64_t begin_task, int64_t end_task, float* scratch);
  void (*backward)(const SsdBackward&, int64_t begin_task, int64_t end_task, float* scratch);
};

#define DLOPS_DECLARE(isa)             \
  namespace isa {                      \
  extern const SsdKernels ssd_kernels; \
  }
DLOPS_FOR_EACH_ISA(DLOPS_DECLARE)
#undef DLOPS_DECLARE

}  // namespace dlops
