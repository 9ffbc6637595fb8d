// Device kernels of the decoding steps. Each launcher returns null, or what went wrong. A batch element whose entry is
// not there starts from zeros, and its state is not kept.
#pragma once

#include "core/state_update.h"

namespace dlops::cuda {

const char* selective_state_update(const ScanUpdate& params, void* stream);
const char* causal_conv1d_update(const ConvUpdate& params, void* stream);

}  // namespace dlops::cuda
