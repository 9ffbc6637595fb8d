// Columns are summed over rows in order, in double, 64 at a time; a task is a range of columns.
#include "cpu/column_sum.h"

namespace dlops {
inline namespace DLOPS_ISA {
namespace {

constexpr int64_t kTile = 64;

template <class T>
void sum_columns(const ColumnSum& p, int64_t begin, int64_t end) {
  T* out = static_cast<T*>(p.out);
  for (int64_t tile = begin; tile < end; tile += kTile) {
    const int64_t width = end - tile < kTile ? end - tile : kTile;
    double total[kTile] = {};
    for (int64_t row = 0; row < p.rows; ++row) {
      const float* partial = p.partial + row * p.width + tile;
#pragma omp simd
      for (int64_t j = 0; j < width; ++j) total[j] += double(partial[j]);
    }
    for (int64_t j = 0; j < width; ++j) out[tile + j] = from_float<T>(float(total[j]));
  }
}

void column_sum(const ColumnSum& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case Dtype::kFloat32: return sum_columns<float>(p, begin, end);
    case Dtype::kBFloat16: return sum_columns<bfloat16>(p, begin, end);
    case Dtype::kFloat16: return sum_columns<float16>(p, begin, end);
  }
}

}  // namespace

const ColumnSumKernels column_sum_kernels = {column_sum};

}  // namespace DLOPS_ISA
}  // namespace dlops
