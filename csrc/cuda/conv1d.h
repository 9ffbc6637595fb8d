// Device kernels of the causal convolution. Each launcher returns null, or what went wrong.
#pragma once

#include "core/conv1d.h"

namespace dlops::cuda {

const char* conv1d_forward(const Conv1dForward& params, void* stream);
const char* conv1d_backward(const Conv1dBackward& params, void* stream);

// The rows of partial sums, and the floats of scratch memory, that conv1d_backward wants.
int64_t conv1d_blocks(const Conv1dBackward& params);
int64_t conv1d_scratch(const Conv1dBackward& params);

}  // namespace dlops::cuda
