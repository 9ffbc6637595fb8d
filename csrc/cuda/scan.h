// Device selective scan, of real states. Each launcher returns null, or what went wrong.
#pragma once

#include "core/scan.h"

namespace dlops::cuda {

constexpr int64_t kScanStates = 256;  // at most

// How the work is divided, for the bindings to allocate by. Where there are too few channels to fill the device, chunks
// of the sequence run side by side.
struct ScanPlan {
  int64_t block;  // channels of a block: Scan::block
  bool split;     // into chunks: checkpoints and totals are needed
};

ScanPlan scan_forward_plan(const Scan& params);
ScanPlan scan_backward_plan(const Scan& params);

// What comes into each chunk, of what each leaves of a zero state (scan_chunks.cu).
const char* scan_chunks(const Scan& params, const float* totals, float* values, bool backwards, void* stream);

// totals: with a split (batch, chunks, dim), the sum of the step sizes of each chunk.
const char* scan_forward(const ScanForward& params, const ScanPlan& plan, float* totals, void* stream);

// What the backward needs beside its arguments, in floats.
struct ScanWorkspace {
  float *states = nullptr, *totals = nullptr, *adjoints = nullptr;
};
// Of states: (batch, chunks at a time, tiles, dim, states), before each tile of a chunk.
int64_t scan_backward_states(const Scan& params, const ScanPlan& plan);

// With a split totals and adjoints, (batch, chunks, dim, states), are needed. dA, dD, ddelta_bias, and dB and dC that
// do not vary, are partial sums by batch and chunk.
const char* scan_backward(const ScanBackward& params, const ScanPlan& plan, const ScanWorkspace& work, void* stream);

}  // namespace dlops::cuda
