// Device normalisation kernels. Each launcher returns null, or what went wrong.
#pragma once

#include "core/norm.h"
#include "cuda/layout.h"

namespace dlops::cuda {

// Forward: a row's first chunk, 64 bytes a thread (8 elements where rows are not aligned to 16 bytes), stays in
// registers. What is beyond waits in shared memory, or where that is too small is read again.
constexpr RowLayout kNormForward[] = {{8, 16}, {32, 4}, {128, 1}, {256, 1}, {512, 1}};
// Backward: 16 elements a thread, and their weight gradients, stay in registers. Beyond, weight gradients are summed in
// shared memory and rows wait there, each where it fits; else the first in global memory, the second are read again.
constexpr RowLayout kNormBackward[] = {{8, 32}, {32, 8}, {128, 2}, {256, 1}, {512, 1}};

constexpr int kNormThreads = 512;  // at most, in a block
static_assert(fits(kNormForward, kNormThreads) && fits(kNormBackward, kNormThreads));

const char* norm_forward(const NormForward& params, void* stream);
const char* norm_backward(const NormBackward& params, void* stream);

// The block_rows that norm_backward is fastest with on the current device.
int64_t norm_backward_block_rows(const NormBackward& params);

}  // namespace dlops::cuda
