// Host kernel of the second stage of batch sums.
#pragma once

#include "core/column_sum.h"

namespace dlops {

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
