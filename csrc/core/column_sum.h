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

}  // namespace dlops
