// Device kernels of the gradients around matrix products. Each launcher returns null, or what went wrong.
#pragma once

#include "core/activation_pass.h"

namespace dlops::cuda {

const char* act_backward(const ActivationPass& params, void* stream);
const char* gate_backward(const ActivationPass& params, void* stream);

// The block_rows that they are fastest with on the current device.
int64_t activation_block_rows(const ActivationPass& params);

}  // namespace dlops::cuda
