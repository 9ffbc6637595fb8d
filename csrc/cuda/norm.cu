// Root-mean-square and layer norm, of x or of x + residual. M rows, D width; a group of blockDim.x threads takes one
// row at a time. Sums are of x less a pivot, the mean of the row's first chunk: where that is the whole row the
// variance is taken in two passes over registers; in a row of n elements with chunks of c at most a factor 1 + n / c is
// cancelled.
#include "cuda/launcher.h"
#include "cuda/norm.h"
#include "cuda/row.h"
#include "cuda/table.h"

namespace dlops::cuda {
namespace {

template <int kVec>
constexpr int kForwardItems = kVec == 1 ? 8 : 4;

// Reads a chunk of x; with a residual, adds that, and writes the rounded sum.
template <class T, int kVec, int kItems>
__device__ __forceinline__ void load_input(const NormForward& p, int64_t row, const Chunk<kVec, kItems>& chunk,
                                           Pack<T, kVec> (&x)[kItems]) {
  const T* from = static_cast<const T*>(p.x) + row * p.x_stride + chunk.first;
  chunk.each([&](int item, int j) { x[item] = load_pack<kVec>(from + j); });
  if (!p.residual) return;
  const T* residual = static_cast<const T*>(p.residual) + row * p.residual_stride + chunk.first;
  T* sum = static_cast<T*>(p.sum) + row * p.width + chunk.first;
  Pack<T, kVec> r[kItems];
  chunk.each([&](int item, int j) { r[item] = load_pack<kVec>(residual + j); });
  chunk.each([&](int item, int j) {
    float v[kVec];
#pragma unroll
    for (int i = 0; i < kVec; ++i) v[i] = x[item].get(i) + r[item].get(i);
    x[item] = Pack<T, kVec>::of(v);
    store_global(sum + j, x[item]);
  });
}

// y = (x - pivot - shift) * rstd * weight + bias on a chunk
template <bool kLayer, class T, int kVec, int kItems>
__device__ __forceinline__ void store_normalised(const NormForward& p, int64_t row, const Chunk<kVec, kItems>& chunk,
                                                 const Pack<T, kVec> (&x)[kItems], float pivot, float shift,
                                                 float rstd) {
  const T* weight = static_cast<const T*>(p.weight);
  const T* bias = static_cast<const T*>(p.bias);
  T* y = static_cast<T*>(p.y) + row * p.width + chunk.first;
  chunk.each([&](int item, int j) {
    const Pack<T, kVec> w = load_pack_or<kVec>(weight, chunk.first + j, 1.0f);
    const Pack<T, kVec> b = load_pack_or<kVec>(bias, chunk.first + j, -0.0f);  // which changes no sum
    float v[kVec];
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      v[i] = x[item].get(i);
      if constexpr (kLayer) v[i] = (v[i] - pivot) - shift;
      v[i] = v[i] * rstd * w.get(i) + b.get(i);
    }
    store_global(y + j, Pack<T, kVec>::of(v));
  });
}

// The mean to so few bits that differences from it are exact for most floats, and then round no mean, but to 1 / 256 of
// the deviation; square is the mean of squares, which tells deviations down to 1 / 4096 of the mean. 12 bits where that
// is out of range.
__device__ __forceinline__ float pivot_near(float mean, float square) {
  const float deviation = sqrtf(fmaxf(square - mean * mean, mean * mean * 0x1p-24f));
  const float rounder = bits_float(float_bits(deviation) & 0x7f800000u) * 0x1.8p15f;  // its last bit is 2^-8 of that
  return rounder > 0 && rounder < 3e38f ? (mean + rounder) - rounder : bits_float(float_bits(mean) & 0xfffff000u);
}

// kWhole: rows are no longer than a chunk. Else keep says whether the dynamic shared memory holds what is beyond.
template <class T, int kVec, bool kLayer, bool kWhole>
__global__ void __launch_bounds__(kNormThreads, 1) forward_kernel(NormForward p, bool keep) {
  constexpr int kItems = kForwardItems<kVec>;
  constexpr int kSums = kWhole ? 1 : 2;
  using Part = Chunk<kVec, kItems>;
  DLOPS_SHARED(float, pivot_scratch, [kSums][kMaxWarps]);
  DLOPS_SHARED(float, scratch, [2][kMaxWarps]);
  DLOPS_DYNAMIC_SHARED(T, kept);
  const int64_t step = Part::columns();
  for (int64_t base = int64_t(blockIdx.x) * blockDim.y; base < p.rows; base += int64_t(gridDim.x) * blockDim.y) {
    const int64_t row = base + threadIdx.y;
    const int64_t end = row < p.rows ? p.width : 0;  // a row past the last still takes part in the block's sums
    const Part head(0, end);
    Pack<T, kVec> x[kItems];
    load_input(p, row, head, x);
    float pivot = 0;
    if constexpr (kLayer) {
      float sum[kSums] = {};  // of x, and of its squares
      head.each([&](int item, int) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          const float v = x[item].get(i);
          sum[0] += v;
          if constexpr (!kWhole) sum[1] += v * v;
        }
      });
      row_sums(sum, pivot_scratch);
      pivot = sum[0] / float(p.width < step ? p.width : step);
      if constexpr (!kWhole) pivot = pivot_near(pivot, sum[1] / float(step));
    }
    float sums[2] = {};  // of x - pivot, and of its squares
    const auto accumulate = [&](const Pack<T, kVec>& pack, float (&to)[2]) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        const float d = pack.get(i) - pivot;
        if constexpr (kLayer) to[0] += d;
        to[1] += d * d;
      }
    };
    head.each([&](int item, int) { accumulate(x[item], sums); });
#pragma unroll 1
    for (int64_t begin = step; !kWhole && begin < p.width; begin += step) {
      const Part part(begin, end);
      Pack<T, kVec> more[kItems];
      load_input(p, row, part, more);
      T* to = kept + (part.first - step);
      float chunk[2] = {};  // sums of their own: long ones round more
      part.each([&](int item, int j) {
        accumulate(more[item], chunk);
        if (keep) store_pack(to + j, more[item]);
      });
      for (int i = 0; i < 2; ++i) sums[i] += chunk[i];
    }
    row_sums(sums, scratch);
    const float shift = sums[0] / float(p.width);
    float variance = sums[1] / float(p.width) - shift * shift;
    if (variance < 0) variance = 0;  // the rounding of a row nearly of one value; a NaN stays
    const float rstd = 1.0f / sqrtf(variance + p.eps);
    if (row < p.rows && threadIdx.x == 0) {
      if constexpr (kLayer) p.mean[row] = kWhole ? pivot : pivot + shift;
      p.rstd[row] = rstd;
    }
    store_normalised<kLayer>(p, row, head, x, pivot, shift, rstd);
    const T* again =
        p.residual ? static_cast<const T*>(p.sum) + row * p.width : static_cast<const T*>(p.x) + row * p.x_stride;
#pragma unroll 1
    for (int64_t begin = step; !kWhole && begin < p.width; begin += step) {
      const Part part(begin, end);
      Pack<T, kVec> more[kItems];
      const T* from = keep ? kept + (part.first - step) : again + part.first;
      part.each([&](int item, int j) { more[item] = load_pack<kVec>(from + j); });
      store_normalised<kLayer>(p, row, part, more, pivot, shift, rstd);
    }
  }
}

constexpr int64_t kBlocksPerProcessor = 32;  // enough that the last ones to finish leave little idle

template <class T, int kVec, bool kLayer>
const char* launch(const NormForward& p, cudaStream_t stream) {
  const RowLayout layout = layout_for<kVec>(kNormForward, p.width, kVec * kForwardItems<kVec>);
  const int64_t held = int64_t(layout.threads) * kVec * kForwardItems<kVec>;
  int64_t shared = std::max<int64_t>(0, p.width - held) * int64_t(sizeof(T));
  const bool keep = shared > 0 && shared <= shared_limit(kNormStatic);
  if (!keep) shared = 0;
  const auto kernel = p.width <= held ? forward_kernel<T, kVec, kLayer, true> : forward_kernel<T, kVec, kLayer, false>;
  if (const char* error = allow_shared(kernel, shared, kNormStatic)) return error;
  const int64_t blocks = std::min(ceil_div(p.rows, layout.rows), processors() * kBlocksPerProcessor);
  DLOPS_LAUNCH(kernel, dim3(unsigned(blocks)), dim3(layout.threads, layout.rows), size_t(shared), stream, p, keep);
  return launch_error();
}

}  // namespace

const char* norm_forward(const NormForward& p, void* stream) {
  if (p.rows == 0) return nullptr;
  return with_dtype(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t size = sizeof(T), row = p.width * size;
    const bool wide = aligned(p.x, p.x_stride * size) && aligned(p.residual, p.residual_stride * size) &&
                      aligned(p.sum) && aligned(p.weight) && aligned(p.bias) && aligned(p.y, row);
    const auto s = static_cast<cudaStream_t>(stream);
    if (p.mean) return wide ? launch<T, kFullVec<T>, true>(p, s) : launch<T, 1, true>(p, s);
    return wide ? launch<T, kFullVec<T>, false>(p, s) : launch<T, 1, false>(p, s);
  });
}

namespace {

template <class T, int kVec>
void list(Table& table) {
  constexpr int kHeld = kVec * kForwardItems<kVec>;
  const auto add = [&](const RowLayout& layout, int64_t width) {
    table.push_back({"norm_forward",
                     {{"element_bytes", sizeof(T)},
                      {"access_bytes", kVec * sizeof(T)},
                      {"width", width},
                      {"threads", layout.threads},
                      {"rows", layout.rows},
                      {"register_columns", layout.threads * kHeld},
                      {"shared_bytes_per_column", width ? 0 : sizeof(T)}}});
  };
  for (const RowLayout& layout : kNormForward)
    if (layout.threads >= kGroup<kVec>) add(layout, layout.threads * kHeld);
  add(std::end(kNormForward)[-1], 0);
}

}  // namespace

void list_norm_forward(Table& table) {
  list<float, kFullVec<float>>(table);
  list<float, 1>(table);
  list<bfloat16, kFullVec<bfloat16>>(table);
  list<bfloat16, 1>(table);
}

}  // namespace dlops::cuda
