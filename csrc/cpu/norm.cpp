// Normalisation on the host. M rows, D width; a task is a range of rows (forward) or of row blocks (backward).
// Each pass over a row after the first finds it in cache. Sums follow simd.h's row_sums; the mean enters as a float
// and what that float leaves of it, so that (x - mean) is exact where |mean| is large beside the spread.
#include "cpu/norm.h"

#include "core/simd.h"

namespace dlops {
inline namespace DLOPS_ISA {
namespace {

constexpr int64_t kRunRows = 32;  // rows added one after the other before their sum joins the block's

#define DLOPS_INLINE __attribute__((always_inline))

template <class T>
DLOPS_INLINE inline const T* row_of(const void* base, int64_t row, int64_t stride) {
  return static_cast<const T*>(base) + row * stride;
}

// y = (x - shift) * scale + offset, times weight, plus bias
template <bool kStream, class T>
void write_normalised(const NormForward& p, const T* x, float shift, float scale, float offset, T* y) {
  const T* weight = static_cast<const T*>(p.weight);
  const T* bias = static_cast<const T*>(p.bias);
  for_lanes(p.width, [&](int64_t j, auto lanes) DLOPS_INLINE {
    vfloat v = (load(x + j, lanes) - shift) * scale + offset;
    if (weight) v = v * load(weight + j, lanes);
    if (bias) v = v + load(bias + j, lanes);
    if constexpr (kStream)
      stream(y + j, v, lanes);
    else
      store(y + j, v, lanes);
  });
}

template <class T, bool kLayer, bool kAdd>
void forward_rows(const NormForward& p, int64_t begin, int64_t end) {
  const int64_t n = p.width;
  const bool streaming = p.stream && can_stream(static_cast<T*>(p.y), n);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = row_of<T>(p.x, row, p.x_stride);
    T* sum = static_cast<T*>(p.sum) + (kAdd ? row * n : 0);
    const T* residual = row_of<T>(p.residual, kAdd ? row : 0, p.residual_stride);
    double total[1], centred[2];  // of x (layer) or of x^2 (rms); of x - shift and of its square
    row_sums<1>(n, total, [&](int64_t j, auto lanes, vfloat(&t)[1]) DLOPS_INLINE {
      vfloat v = load(x + j, lanes);
      if constexpr (kAdd) {
        store(sum + j, v + load(residual + j, lanes), lanes);
        v = load(sum + j, lanes);  // the norm is of the rounded sum
      }
      t[0] = kLayer ? v : v * v;
    });
    if constexpr (kAdd) x = sum;
    float shift = 0, mean_error = 0;
    double square = total[0] / double(n);
    if constexpr (kLayer) {
      shift = float(square);
      row_sums<2>(n, centred, [&](int64_t j, auto lanes, vfloat(&t)[2]) DLOPS_INLINE {
        const vfloat d = load(x + j, lanes) - shift;
        t[0] = d;
        t[1] = d * d;
      });
      // What the sum and the rounding of the mean left: a row of one value then comes out as zeros.
      const double rest = centred[0] / double(n);
      mean_error = float(rest);
      square = centred[1] / double(n) - rest * rest;
      if (square < 0) square = 0;
      p.mean[row] = shift;
    }
    // In float like the definition: then the rounding of x^2 and of its root cancel in a row of one element.
    const float rstd = 1.0f / __builtin_sqrtf(float(square) + float(p.eps));
    p.rstd[row] = rstd;
    T* y = static_cast<T*>(p.y) + row * n;
    if (streaming)
      write_normalised<true>(p, x, shift, rstd, -mean_error * rstd, y);
    else
      write_normalised<false>(p, x, shift, rstd, -mean_error * rstd, y);
  }
  if (streaming) stream_fence();
}

template <class T>
void forward_typed(const NormForward& p, int64_t begin, int64_t end) {
  if (p.mean)
    p.residual ? forward_rows<T, true, true>(p, begin, end) : forward_rows<T, true, false>(p, begin, end);
  else
    p.residual ? forward_rows<T, false, true>(p, begin, end) : forward_rows<T, false, false>(p, begin, end);
}

void forward(const NormForward& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case Dtype::kFloat32: return forward_typed<float>(p, begin, end);
    case Dtype::kBFloat16: return forward_typed<bfloat16>(p, begin, end);
    case Dtype::kFloat16: return forward_typed<float16>(p, begin, end);
  }
}

// With xhat = (x - mean) * rstd and g = dy * weight: dx = rstd * (g - xhat * mean(g * xhat) - mean(g)), the last term
// only with a mean; dweight = sum of dy * xhat and dbias = sum of dy over rows. The stored mean is rounded; what the
// rounding left in xhat is its own mean, and is taken out again.
template <class T, bool kLayer>
void backward_row(const NormBackward& p, int64_t row, float* dweight, float* dbias) {
  const int64_t n = p.width;
  const T* dy = row_of<T>(p.dy, row, p.dy_stride);
  const T* x = row_of<T>(p.x, row, p.x_stride);
  const T* weight = static_cast<const T*>(p.weight);
  const float rstd = p.rstd[row];
  const float mean = kLayer ? p.mean[row] : 0;
  const auto normalised = [&](int64_t j, auto lanes) DLOPS_INLINE { return (load(x + j, lanes) - mean) * rstd; };
  double sums[kLayer ? 3 : 1] = {};  // of g * xhat, of g, of xhat
  if (p.dx || kLayer)
    row_sums(n, sums, [&](int64_t j, auto lanes, auto& t) DLOPS_INLINE {
      const vfloat d = load(dy + j, lanes);
      const vfloat xhat = normalised(j, lanes);
      const vfloat g = weight ? d * load(weight + j, lanes) : d;
      t[0] = g * xhat;
      if constexpr (kLayer) {
        t[1] = g;
        t[2] = xhat;
      }
    });
  const double offset = kLayer ? sums[kLayer * 2] / double(n) : 0;
  const float shift = float(offset);
  const float slope = float((sums[0] - offset * sums[kLayer]) / double(n));
  const float constant = kLayer ? float(sums[kLayer] / double(n)) : 0;
  const T* dsum = row_of<T>(p.dsum, p.dsum ? row : 0, p.dsum_stride);
  const auto gradient = [&](int64_t j, auto lanes) DLOPS_INLINE {
    const vfloat d = load(dy + j, lanes);
    const vfloat xhat = kLayer ? normalised(j, lanes) - shift : normalised(j, lanes);
    if (dweight) store(dweight + j, load(dweight + j, lanes) + d * xhat, lanes);
    if (kLayer && dbias) store(dbias + j, load(dbias + j, lanes) + d, lanes);
    const vfloat g = weight ? d * load(weight + j, lanes) : d;
    // Unfused: g and the product cancel when they are equal, as they nearly are in very short rows.
    const vfloat v = (g - constant - rounded(xhat * slope)) * rstd;
    return dsum ? v + load(dsum + j, lanes) : v;
  };
  T* dx = p.dx ? static_cast<T*>(p.dx) + row * n : nullptr;
  if (!dx)
    for_lanes(n, [&](int64_t j, auto lanes) DLOPS_INLINE { gradient(j, lanes); });
  else if (p.stream && can_stream(static_cast<T*>(p.dx), n))
    for_lanes(n, [&](int64_t j, auto lanes) DLOPS_INLINE { stream(dx + j, gradient(j, lanes), lanes); });
  else
    for_lanes(n, [&](int64_t j, auto lanes) DLOPS_INLINE { store(dx + j, gradient(j, lanes), lanes); });
}

// Moves a run's sums into the block's and clears them for the next run.
void flush(int64_t n, float* run, float* block) {
  for_lanes(n, [&](int64_t j, auto lanes) DLOPS_INLINE {
    store(block + j, load(block + j, lanes) + load(run + j, lanes), lanes);
    store(run + j, vfloat{}, lanes);
  });
}

template <class T, bool kLayer>
void backward_blocks(const NormBackward& p, int64_t begin, int64_t end, float* scratch) {
  const int64_t n = p.width;
  float* run_dweight = p.dweight ? scratch : nullptr;
  float* run_dbias = p.dbias ? scratch + n : nullptr;
  __builtin_memset(scratch, 0, 2 * n * sizeof(float));
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * p.block_rows;
    const int64_t last = first + p.block_rows < p.rows ? first + p.block_rows : p.rows;
    if (p.dweight) __builtin_memset(p.dweight + block * n, 0, n * sizeof(float));
    if (p.dbias) __builtin_memset(p.dbias + block * n, 0, n * sizeof(float));
    for (int64_t row = first; row < last; ++row) {
      backward_row<T, kLayer>(p, row, run_dweight, run_dbias);
      if (row + 1 < last && (row + 1 - first) % kRunRows) continue;
      if (p.dweight) flush(n, run_dweight, p.dweight + block * n);
      if (p.dbias) flush(n, run_dbias, p.dbias + block * n);
    }
  }
  if (p.stream) stream_fence();
}

template <class T>
void backward_typed(const NormBackward& p, int64_t begin, int64_t end, float* scratch) {
  p.mean ? backward_blocks<T, true>(p, begin, end, scratch) : backward_blocks<T, false>(p, begin, end, scratch);
}

void backward(const NormBackward& p, int64_t begin, int64_t end, float* scratch) {
  switch (p.dtype) {
    case Dtype::kFloat32: return backward_typed<float>(p, begin, end, scratch);
    case Dtype::kBFloat16: return backward_typed<bfloat16>(p, begin, end, scratch);
    case Dtype::kFloat16: return backward_typed<float16>(p, begin, end, scratch);
  }
}

}  // namespace

const NormKernels norm_kernels = {forward, backward};

}  // namespace DLOPS_ISA
}  // namespace dlops
