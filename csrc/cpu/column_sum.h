// Sum over rows of partial sums: the second stage of every gradient that sums over a batch.
#pragma once

#include "core/dtype.h"

namespace dlops {

struct ColumnSum {
  Dtype dtype;           // of out
  int64_t rows, width;   // of partial
  const float* partial;  // contiguous
  void* out;             // (width)
};

struct ColumnSumKernels {
  void (*column_sum)(const ColumnSum&, int64_t begin_column, int64_t end_column);
};

#define DLOPS_DECLARE(isa)                          \
  namespace isa {                                   \
  extern const ColumnSumKernels column_sum_kernels; \
  }
DLOPS_FOR_EACH_ISA(DLOPS_DECLARE)
#undef DLOPS_DECLARE

}  // namespace dlops
