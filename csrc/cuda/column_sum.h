// Device kernel of the second stage of batch sums. Returns null, or what went wrong.
#pragma once

#include "core/column_sum.h"

namespace dlops::cuda {

const char* column_sum(const ColumnSum& params, void* stream);

}  // namespace dlops::cuda
