// Columns are summed over rows in double: kRows threads share a column, and their sums are added in order.
#include "cuda/column_sum.h"
#include "cuda/launcher.h"

namespace dlops::cuda {
namespace {

constexpr int kColumns = 32, kRows = 16;

template <class T>
__global__ void __launch_bounds__(kColumns* kRows) column_sum_kernel(ColumnSum p) {
  DLOPS_SHARED(double, sums, [kRows][kColumns]);
  const int64_t column = int64_t(blockIdx.x) * kColumns + threadIdx.x;
  double sum = 0;
  if (column < p.width)
    for (int64_t row = threadIdx.y; row < p.rows; row += kRows) sum += double(p.partial[row * p.width + column]);
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || column >= p.width) return;
  for (int i = 1; i < kRows; ++i) sum += sums[i][threadIdx.x];
  static_cast<T*>(p.out)[column] = from_float<T>(float(sum));
}

}  // namespace

const char* column_sum(const ColumnSum& p, void* stream) {
  if (p.width == 0) return nullptr;
  return with_dtype(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    DLOPS_LAUNCH(column_sum_kernel<T>, dim3(unsigned(ceil_div(p.width, kColumns))), dim3(kColumns, kRows), 0,
                 static_cast<cudaStream_t>(stream), p);
    return launch_error();
  });
}

}  // namespace dlops::cuda
