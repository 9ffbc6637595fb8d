// Root-mean-square norm on the device. M rows, D width; blockDim.x threads share a row, blockDim.y rows share a block.
// Forward: every group of threads takes one row; up to kItems packs of kVec elements per thread stay in registers, so
// that x is read once (kItems = 0: rows of any length, read twice). Backward: a fixed grid walks the rows and keeps its
// weight gradient in registers; a second kernel adds the blocks' sums in order.
#include "core/device.h"
#include "cuda/norm.h"

namespace dlops {
namespace {

// How a row is spread over threads.
struct Layout {
  int vec;      // elements per access: 16 bytes' worth, or 1 where a row or pointer is not aligned to that
  int items;    // accesses a thread keeps in registers; 0: as many as it takes, none kept
  int threads;  // per row
  int rows;     // per block
};

Layout choose_layout(int64_t width, int vec, int max_threads, int block_threads) {
  const int64_t packs = width / vec;
  for (int threads : {32, 128, 256, 512, 1024}) {
    if (threads > max_threads || packs > 4 * threads || vec == 1) continue;
    const int items = packs > 2 * threads ? 4 : packs > threads ? 2 : 1;
    return {vec, items, threads, threads < block_threads ? block_threads / threads : 1};
  }
  const int threads = packs <= 4 * kWarp ? kWarp : packs <= 4096 ? 256 : max_threads;
  return {vec, 0, threads, threads < block_threads ? block_threads / threads : 1};
}

Layout forward_layout(int64_t width, int vec) { return choose_layout(width, vec, 1024, 128); }

// A block of several rows adds their weight gradients in shared memory: at most 512 packs, 16 KiB.
Layout backward_layout(int64_t width, int vec) { return choose_layout(width, vec, 512, 256); }

bool aligned(const void* p, int64_t stride_bytes) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride_bytes % 16 == 0;
}

template <int N, class T>
__device__ __forceinline__ float square_sum(const Pack<T, N>& pack) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) sum += to_float(pack.value[i]) * to_float(pack.value[i]);
  return sum;
}

template <int N, class T>
__device__ __forceinline__ Pack<T, N> normalised(const Pack<T, N>& x, float rstd, const T* weight, int64_t j) {
  Pack<T, N> y, w;
  if (weight) w = load_pack<N>(weight + j);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float v = to_float(x.value[i]) * rstd;
    y.value[i] = from_float<T>(weight ? v * to_float(w.value[i]) : v);
  }
  return y;
}

template <class T, int kVec, int kItems>
__global__ void __launch_bounds__(1024) forward_kernel(RmsNormForward p) {
  DLOPS_SHARED(float, scratch, [kMaxWarps]);
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool exists = row < p.rows;  // a row past the end still takes part in the block's sums
  const int64_t n = exists ? p.width : 0;
  const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
  const T* weight = static_cast<const T*>(p.weight);
  T* y = static_cast<T*>(p.y) + row * p.width;
  const int64_t first = int64_t(threadIdx.x) * kVec, step = int64_t(blockDim.x) * kVec;

  Pack<T, kVec> kept[kItems ? kItems : 1];
  float sum = 0;
  if constexpr (kItems > 0) {
#pragma unroll
    for (int item = 0; item < kItems; ++item)
      if (first + item * step < n) kept[item] = load_pack<kVec>(x + first + item * step);
#pragma unroll
    for (int item = 0; item < kItems; ++item)
      if (first + item * step < n) sum += square_sum(kept[item]);
  } else {
    for (int64_t j = first; j < n; j += step) sum += square_sum(load_pack<kVec>(x + j));
  }
  const float rstd = 1.0f / sqrtf(row_sum(sum, scratch) / float(p.width) + p.eps);
  if (exists && threadIdx.x == 0) p.rstd[row] = rstd;
  if constexpr (kItems > 0) {
#pragma unroll
    for (int item = 0; item < kItems; ++item) {
      const int64_t j = first + item * step;
      if (j < n) store_pack(y + j, normalised(kept[item], rstd, weight, j));
    }
  } else {
    for (int64_t j = first; j < n; j += step) store_pack(y + j, normalised(load_pack<kVec>(x + j), rstd, weight, j));
  }
}

// The terms of one pack: adds dy * weight * xhat into dot and, where weight_sum is not null, dy * xhat into it.
template <int N, class T>
__device__ __forceinline__ void accumulate(const Pack<T, N>& dy, const Pack<T, N>& x, const T* weight, int64_t j,
                                           float rstd, float& dot, float* weight_sum) {
  Pack<T, N> w;
  if (weight) w = load_pack<N>(weight + j);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float term = to_float(dy.value[i]) * (to_float(x.value[i]) * rstd);
    dot += weight ? term * to_float(w.value[i]) : term;
    if (weight_sum) weight_sum[i] += term;
  }
}

template <int N, class T>
__device__ __forceinline__ void store_gradient(const Pack<T, N>& dy, const Pack<T, N>& x, const T* weight,
                                               const T* dsum, T* dx, int64_t j, float rstd, float slope) {
  Pack<T, N> w, s, out;
  if (weight) w = load_pack<N>(weight + j);
  if (dsum) s = load_pack<N>(dsum + j);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    // Both products are rounded: the two cancel when they are equal, as they nearly are in very short rows.
    const float g = weight ? __fmul_rn(to_float(dy.value[i]), to_float(w.value[i])) : to_float(dy.value[i]);
    const float v = (g - __fmul_rn(to_float(x.value[i]) * rstd, slope)) * rstd;
    out.value[i] = from_float<T>(dsum ? v + to_float(s.value[i]) : v);
  }
  store_pack(dx + j, out);
}

template <class T, int kVec, int kItems>
__global__ void __launch_bounds__(512) backward_kernel(RmsNormBackward p) {
  DLOPS_SHARED(float, scratch, [kMaxWarps]);
  DLOPS_DYNAMIC_SHARED(float, block_sum);  // (D) where a block holds several rows
  constexpr int kKept = kItems ? kItems : 1;
  const T* weight = static_cast<const T*>(p.weight);
  const int64_t first = int64_t(threadIdx.x) * kVec, step = int64_t(blockDim.x) * kVec;
  float* partial =
      p.partial ? p.partial + (int64_t(blockIdx.x) * (kItems ? 1 : blockDim.y) + (kItems ? 0 : threadIdx.y)) * p.width
                : nullptr;
  float weight_sum[kKept][kVec] = {};
  if constexpr (kItems == 0) {
    if (partial)
      for (int64_t j = first; j < p.width; j += step)
        for (int i = 0; i < kVec; ++i) partial[j + i] = 0;
  }

  const int64_t stride = int64_t(gridDim.x) * blockDim.y;
  for (int64_t base = int64_t(blockIdx.x) * blockDim.y; base < p.rows; base += stride) {
    const int64_t row = base + threadIdx.y;
    const bool exists = row < p.rows;
    const int64_t n = exists ? p.width : 0;
    const float rstd = exists ? p.rstd[row] : 0.0f;
    const T* dy = static_cast<const T*>(p.dy) + row * p.dy_stride;
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
    const T* dsum = p.dsum ? static_cast<const T*>(p.dsum) + row * p.dsum_stride : nullptr;
    T* dx = static_cast<T*>(p.dx) + row * p.width;
    Pack<T, kVec> dy_kept[kKept], x_kept[kKept];
    float dot = 0;
    if constexpr (kItems > 0) {
#pragma unroll
      for (int item = 0; item < kItems; ++item) {
        const int64_t j = first + item * step;
        if (j >= n) continue;
        dy_kept[item] = load_pack<kVec>(dy + j);
        x_kept[item] = load_pack<kVec>(x + j);
      }
#pragma unroll
      for (int item = 0; item < kItems; ++item) {
        const int64_t j = first + item * step;
        if (j < n) accumulate(dy_kept[item], x_kept[item], weight, j, rstd, dot, weight_sum[item]);
      }
    } else {
      for (int64_t j = first; j < n; j += step)
        accumulate(load_pack<kVec>(dy + j), load_pack<kVec>(x + j), weight, j, rstd, dot,
                   partial ? partial + j : nullptr);
    }
    if (!p.dx) continue;
    const float slope = row_sum(dot, scratch) / float(p.width);
    if constexpr (kItems > 0) {
#pragma unroll
      for (int item = 0; item < kItems; ++item) {
        const int64_t j = first + item * step;
        if (j < n) store_gradient(dy_kept[item], x_kept[item], weight, dsum, dx, j, rstd, slope);
      }
    } else {
      for (int64_t j = first; j < n; j += step)
        store_gradient(load_pack<kVec>(dy + j), load_pack<kVec>(x + j), weight, dsum, dx, j, rstd, slope);
    }
  }

  if constexpr (kItems > 0) {
    if (!partial) return;
    if (blockDim.y > 1) {  // add the block's rows in order
      for (unsigned turn = 0; turn < blockDim.y; ++turn) {
        __syncthreads();
        if (threadIdx.y != turn) continue;
#pragma unroll
        for (int item = 0; item < kItems; ++item)
#pragma unroll
          for (int i = 0; i < kVec; ++i) {
            const int64_t j = first + item * step + i;
            if (j < p.width) block_sum[j] = turn ? block_sum[j] + weight_sum[item][i] : weight_sum[item][i];
          }
      }
      __syncthreads();
      for (int64_t j = int64_t(threadIdx.y) * blockDim.x + threadIdx.x; j < p.width; j += blockDim.x * blockDim.y)
        partial[j] = block_sum[j];
      return;
    }
#pragma unroll
    for (int item = 0; item < kItems; ++item)
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        const int64_t j = first + item * step + i;
        if (j < p.width) partial[j] = weight_sum[item][i];
      }
  }
}

constexpr int kSumColumns = 32, kSumRows = 8;

// dweight = sum of partial over its rows: kSumRows threads per column, then their sums in order.
template <class T>
__global__ void __launch_bounds__(kSumColumns* kSumRows)
    column_sum_kernel(const float* partial, int64_t rows, int64_t width, T* out) {
  DLOPS_SHARED(float, sums, [kSumRows][kSumColumns]);
  const int64_t column = int64_t(blockIdx.x) * kSumColumns + threadIdx.x;
  float sum = 0;
  if (column < width)
    for (int64_t row = threadIdx.y; row < rows; row += kSumRows) sum += partial[row * width + column];
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y || column >= width) return;
  for (int i = 1; i < kSumRows; ++i) sum += sums[i][threadIdx.x];
  out[column] = from_float<T>(sum);
}

const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <class T>
constexpr int kFullVec = 16 / int(sizeof(T));

template <class T, int kVec, int kItems>
void launch_forward(const RmsNormForward& p, const Layout& layout, cudaStream_t stream) {
  const int64_t blocks = (p.rows + layout.rows - 1) / layout.rows;
  DLOPS_LAUNCH((forward_kernel<T, kVec, kItems>), dim3(unsigned(blocks)), dim3(layout.threads, layout.rows), 0, stream,
               p);
}

template <class T>
void forward_typed(const RmsNormForward& p, cudaStream_t stream) {
  const bool wide = p.width % kFullVec<T> == 0 && aligned(p.x, p.x_stride * sizeof(T)) && aligned(p.weight, 0) &&
                    aligned(p.y, p.width * sizeof(T));
  const Layout layout = forward_layout(p.width, wide ? kFullVec<T> : 1);
  if (!wide) return launch_forward<T, 1, 0>(p, layout, stream);
  switch (layout.items) {
    case 1: return launch_forward<T, kFullVec<T>, 1>(p, layout, stream);
    case 2: return launch_forward<T, kFullVec<T>, 2>(p, layout, stream);
    case 4: return launch_forward<T, kFullVec<T>, 4>(p, layout, stream);
    default: return launch_forward<T, kFullVec<T>, 0>(p, layout, stream);
  }
}

template <class T>
Layout backward_layout_of(const RmsNormBackward& p) {
  const bool wide = p.width % kFullVec<T> == 0 && aligned(p.dy, p.dy_stride * sizeof(T)) &&
                    aligned(p.x, p.x_stride * sizeof(T)) && aligned(p.weight, 0) &&
                    aligned(p.dsum, p.dsum_stride * sizeof(T)) && aligned(p.dx, p.width * sizeof(T));
  return backward_layout(p.width, wide ? kFullVec<T> : 1);
}

Layout backward_layout_of(const RmsNormBackward& p) {
  return p.dtype == Dtype::kFloat32 ? backward_layout_of<float>(p) : backward_layout_of<bfloat16>(p);
}

// Enough blocks to fill the device twice over, each with one row of partial sums to add up at the end.
int64_t backward_grid(int64_t rows, const Layout& layout) {
  int device = 0, processors = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  const int64_t groups = (rows + layout.rows - 1) / layout.rows;
  return groups < 2 * processors ? groups : 2 * processors;
}

template <class T, int kVec, int kItems>
void launch_backward(const RmsNormBackward& p, const Layout& layout, cudaStream_t stream) {
  const size_t shared = kItems && layout.rows > 1 && p.partial ? p.width * sizeof(float) : 0;
  DLOPS_LAUNCH((backward_kernel<T, kVec, kItems>), dim3(unsigned(backward_grid(p.rows, layout))),
               dim3(layout.threads, layout.rows), shared, stream, p);
}

template <class T>
void backward_typed(const RmsNormBackward& p, cudaStream_t stream) {
  const Layout layout = backward_layout_of<T>(p);
  if (p.rows > 0) {
    if (layout.vec == 1)
      launch_backward<T, 1, 0>(p, layout, stream);
    else if (layout.items == 1)
      launch_backward<T, kFullVec<T>, 1>(p, layout, stream);
    else if (layout.items == 2)
      launch_backward<T, kFullVec<T>, 2>(p, layout, stream);
    else if (layout.items == 4)
      launch_backward<T, kFullVec<T>, 4>(p, layout, stream);
    else
      launch_backward<T, kFullVec<T>, 0>(p, layout, stream);
  }
  if (!p.partial) return;
  const unsigned blocks = unsigned((p.width + kSumColumns - 1) / kSumColumns);
  DLOPS_LAUNCH(column_sum_kernel<T>, dim3(blocks), dim3(kSumColumns, kSumRows), 0, stream, p.partial,
               cuda::rms_norm_backward_blocks(p), p.width, static_cast<T*>(p.dweight));
}

}  // namespace

namespace cuda {

const char* rms_norm_forward(const RmsNormForward& p, void* stream) {
  if (p.rows == 0) return nullptr;
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  switch (p.dtype) {
    case Dtype::kFloat32: forward_typed<float>(p, s); break;
    case Dtype::kBFloat16: forward_typed<bfloat16>(p, s); break;
    case Dtype::kFloat16: forward_typed<float16>(p, s); break;
  }
  return launch_error();
}

const char* rms_norm_backward(const RmsNormBackward& p, void* stream) {
  if (p.width == 0) return nullptr;
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  switch (p.dtype) {
    case Dtype::kFloat32: backward_typed<float>(p, s); break;
    case Dtype::kBFloat16: backward_typed<bfloat16>(p, s); break;
    case Dtype::kFloat16: backward_typed<float16>(p, s); break;
  }
  return launch_error();
}

int64_t rms_norm_backward_blocks(const RmsNormBackward& p) {
  const Layout layout = backward_layout_of(p);
  return backward_grid(p.rows, layout) * (layout.items ? 1 : layout.rows);
}

}  // namespace cuda
}  // namespace dlops
