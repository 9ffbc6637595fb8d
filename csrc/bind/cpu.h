// Running host kernels: the instruction set, torch's thread pool, the second stage of batch sums.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "bind/check.h"

namespace dlops {

// The best instruction set that this processor has and the build contains: generic, avx2 or avx512.
enum class Isa { generic, avx2, avx512 };
Isa cpu_isa();
const char* cpu_isa_name();

// DLOPS_KERNELS(norm_kernels) is the table of that name for the instruction set in use.
#if defined(__x86_64__)
#define DLOPS_KERNELS(table)                       \
  (cpu_isa() == Isa::avx512 ? dlops::avx512::table \
   : cpu_isa() == Isa::avx2 ? dlops::avx2::table   \
                            : dlops::generic::table)
#else
#define DLOPS_KERNELS(table) dlops::generic::table
#endif

// Outputs of at least this many bytes are written past the caches: the next reader would not find them there anyway.
constexpr int64_t kStreamBytes = 16 << 20;

// f(begin, end) over [0, tasks) on torch's threads; elements is the work of one task.
template <class F>
void parallel(int64_t tasks, int64_t elements, const F& f) {
  constexpr int64_t kGrain = 32768;
  if (tasks > 0)
    torch::stable::parallel_for(0, tasks, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements)), f);
}

// Rows whose gradients are summed into one partial row. A function of the shape alone, so that the sums do not depend
// on the number of threads.
inline int64_t block_rows(int64_t rows) {
  constexpr int64_t kBlocks = 128, kMinRows = 8;
  return std::max<int64_t>(kMinRows, (rows + kBlocks - 1) / kBlocks);
}

// Partial sums (blocks, width) in float32, and their sum in x's dtype.
Tensor empty_partial(const Tensor& x, int64_t blocks, int64_t width);
Tensor column_sum(const Tensor& x, Dtype dtype, const Tensor& partial);

}  // namespace dlops
