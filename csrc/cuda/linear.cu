// x (M, K) times weight (N, K) transposed for M <= 16: bound by the bytes of the weight, each of which is read once.
// A warp takes kColumns rows of the weights and spans of K, its lanes adjacent packs; M decides how a block's warps
// share N (which shares x) and K (which needs less of N to fill the device). Sums over lanes, warps and blocks of K are
// taken in a fixed order.
#include "cuda/launcher.h"
#include "cuda/linear.h"
#include "cuda/table.h"

namespace dlops::cuda {
namespace {

constexpr int kWarps = 8, kColumns = 4;

// kRows: M, or the next power of two. kMatrices: 2 with a gate.
template <class T, int kVec, int kRows, int kMatrices>
struct Tile {
  static constexpr int kWarpsN = kRows <= 2 ? 1 : kRows / 2, kWarpsK = kWarps / kWarpsN;
  static constexpr int kOutputs = kColumns / kMatrices;     // of a warp
  static constexpr int kBlockOutputs = kWarpsN * kOutputs;  // of a block
  static constexpr int kSteps = kVec == 1 ? 8 : 2;          // packs of a row of the weight that a lane has in flight
  static constexpr int kSpan = kWarp * kVec * kSteps;       // of K, for a warp
  static constexpr int kChunk = kWarpsK * kSpan;            // of K, for a block
};

// y, and the products where they are asked for, of one output.
template <class T, int kMatrices>
__device__ __forceinline__ void finish(const SkinnyLinear& p, int64_t m, int64_t n, float (&product)[kMatrices]) {
  const int64_t at = m * p.width + n;
#pragma unroll
  for (int matrix = 0; matrix < kMatrices; ++matrix) {
    if (p.bias[matrix]) product[matrix] += to_float(static_cast<const T*>(p.bias[matrix])[n]);
    if (p.pre[matrix]) static_cast<T*>(p.pre[matrix])[at] = from_float<T>(product[matrix]);
  }
  float y = 0;
  with_activation(p.activation, p.params, [&](auto activation) { y = activation.value(product[0]); });
  if constexpr (kMatrices == 2) y *= product[1];
  static_cast<T*>(p.y)[at] = from_float<T>(y);
}

template <class T, int kVec, int kRows, int kMatrices>
__global__ void __launch_bounds__(kWarps* kWarp, 1) skinny_linear_kernel(SkinnyLinear p) {
  using L = Tile<T, kVec, kRows, kMatrices>;
  using P = Pack<T, kVec>;
  constexpr int kPacks = L::kChunk / kVec;
  DLOPS_SHARED(P, xs, [kRows][kPacks]);
  DLOPS_SHARED(float, sums, [L::kWarpsK][L::kWarpsN][kColumns][kRows]);
  const int thread = int(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int warp_n = warp % L::kWarpsN, warp_k = warp / L::kWarpsN;
  const int64_t block_n = int64_t(blockIdx.x) * L::kBlockOutputs, first_n = block_n + warp_n * L::kOutputs;
  const int64_t begin = int64_t(blockIdx.y) * p.split_depth;
  const int64_t end = begin + p.split_depth < p.depth ? begin + p.split_depth : p.depth;

  float acc[kColumns][kRows] = {};
#pragma unroll 1
  for (int64_t k = begin; k < end; k += L::kChunk) {
    // The weights first: they are on their way while x is copied.
    P w[kColumns][L::kSteps];
    const int64_t first_k = k + warp_k * L::kSpan + lane * kVec;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int64_t n = first_n + c % L::kOutputs;
      const int matrix = c / L::kOutputs;
      const T* row = static_cast<const T*>(p.weight[matrix]) + n * p.weight_stride[matrix] + first_k;
#pragma unroll
      for (int s = 0; s < L::kSteps; ++s) {
        w[c][s] = P{};
        if (n < p.width && first_k + s * kWarp * kVec < end) w[c][s] = load_pack<kVec>(row + s * kWarp * kVec);
      }
    }
    __syncthreads();  // the last chunk's readers are done
    for (int i = thread; i < kRows * kPacks; i += kWarps * kWarp) {
      const int m = i / kPacks;
      const int64_t at = k + i % kPacks * kVec;
      P pack{};
      if (m < p.rows && at < end) pack = load_pack<kVec>(static_cast<const T*>(p.x) + m * p.x_stride + at);
      xs[m][i % kPacks] = pack;
    }
    __syncthreads();
#pragma unroll
    for (int s = 0; s < L::kSteps; ++s) {
      float wf[kColumns][kVec];
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
#pragma unroll
        for (int i = 0; i < kVec; ++i) wf[c][i] = w[c][s].get(i);
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        const P x = xs[m][(warp_k * L::kSpan) / kVec + s * kWarp + lane];
#pragma unroll
        for (int i = 0; i < kVec; ++i)
#pragma unroll
          for (int c = 0; c < kColumns; ++c) acc[c][m] += wf[c][i] * x.get(i);
      }
    }
  }

#pragma unroll
  for (int c = 0; c < kColumns; ++c)
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      const float sum = warp_sum(acc[c][m]);
      if (lane == 0) sums[warp_k][warp_n][c][m] = sum;
    }
  __syncthreads();
  for (int i = thread; i < L::kBlockOutputs * kRows; i += kWarps * kWarp) {
    const int m = i / L::kBlockOutputs, output = i % L::kBlockOutputs;
    const int64_t n = block_n + output;
    if (m >= p.rows || n >= p.width) continue;
    float product[kMatrices] = {};
#pragma unroll
    for (int matrix = 0; matrix < kMatrices; ++matrix)
#pragma unroll
      for (int part_k = 0; part_k < L::kWarpsK; ++part_k)
        product[matrix] += sums[part_k][output / L::kOutputs][matrix * L::kOutputs + output % L::kOutputs][m];
    if (!p.partial) {
      finish<T, kMatrices>(p, m, n, product);
    } else {
#pragma unroll
      for (int matrix = 0; matrix < kMatrices; ++matrix)
        p.partial[((int64_t(blockIdx.y) * kMatrices + matrix) * p.rows + m) * p.width + n] = product[matrix];
    }
  }
}

constexpr int kThreads = 256;

// Adds the parts of K in order; a thread takes one output.
template <class T, int kMatrices>
__global__ void __launch_bounds__(kThreads) combine_kernel(SkinnyLinear p, int64_t splits) {
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x, outputs = p.rows * p.width;
  if (at >= outputs) return;
  float product[kMatrices] = {};
  for (int64_t split = 0; split < splits; ++split)
#pragma unroll
    for (int matrix = 0; matrix < kMatrices; ++matrix)
      product[matrix] += p.partial[(split * kMatrices + matrix) * outputs + at];
  finish<T, kMatrices>(p, at / p.width, at % p.width, product);
}

template <class T>
bool all_aligned(const SkinnyLinear& p) {
  const int64_t size = sizeof(T);
  return p.depth * size % 16 == 0 && aligned(p.x, p.x_stride * size) &&
         aligned(p.weight[0], p.weight_stride[0] * size) && aligned(p.weight[1], p.weight_stride[1] * size);
}

// Calls f with the Tile of a call.
template <class T, int kVec, int kMatrices, class F>
auto with_rows(const SkinnyLinear& p, F f) {
  if (p.rows <= 1) return f(Tile<T, kVec, 1, kMatrices>());
  if (p.rows <= 2) return f(Tile<T, kVec, 2, kMatrices>());
  if (p.rows <= 4) return f(Tile<T, kVec, 4, kMatrices>());
  if (p.rows <= 8) return f(Tile<T, kVec, 8, kMatrices>());
  return f(Tile<T, kVec, 16, kMatrices>());
}

template <class F>
auto with_tile(const SkinnyLinear& p, F f) {
  return with_dtype(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const bool wide = all_aligned<T>(p);
    if (p.gated) return wide ? with_rows<T, kFullVec<T>, 2>(p, f) : with_rows<T, 1, 2>(p, f);
    return wide ? with_rows<T, kFullVec<T>, 1>(p, f) : with_rows<T, 1, 1>(p, f);
  });
}

template <class T, int kVec, int kRows, int kMatrices>
const char* launch(Tile<T, kVec, kRows, kMatrices> tile, const SkinnyLinear& p, cudaStream_t stream) {
  const dim3 grid(unsigned(ceil_div(p.width, tile.kBlockOutputs)), unsigned(p.splits()));
  DLOPS_LAUNCH((skinny_linear_kernel<T, kVec, kRows, kMatrices>), grid, dim3(kWarps * kWarp), 0, stream, p);
  if (p.partial)
    DLOPS_LAUNCH((combine_kernel<T, kMatrices>), dim3(unsigned(ceil_div(p.rows * p.width, kThreads))), dim3(kThreads),
                 0, stream, p, p.splits());
  return launch_error();
}

}  // namespace

const char* skinny_linear(const SkinnyLinear& p, void* stream) {
  if (p.rows == 0 || p.width == 0) return nullptr;
  return with_tile(p, [&](auto tile) { return launch(tile, p, static_cast<cudaStream_t>(stream)); });
}

int64_t skinny_linear_split_depth(const SkinnyLinear& p) {
  constexpr int64_t kBlocksPerProcessor = 2;
  return with_tile(p, [&](auto tile) {
    const int64_t blocks = std::max<int64_t>(1, ceil_div(p.width, tile.kBlockOutputs));
    const int64_t wanted = std::min(ceil_div(processors() * kBlocksPerProcessor, blocks), kMaxGridY);
    return std::max<int64_t>(1, ceil_div(ceil_div(p.depth, tile.kChunk), wanted)) * tile.kChunk;
  });
}

namespace {

template <class T, int kVec, int kMatrices>
void list(Table& table) {
  for (int64_t rows = 1; rows <= SkinnyLinear::kMaxRows; rows *= 2)
    with_rows<T, kVec, kMatrices>({.rows = rows}, [&](auto tile) {
      table.push_back({"skinny_linear",
                       {{"element_bytes", sizeof(T)},
                        {"access_bytes", kVec * sizeof(T)},
                        {"rows", rows},
                        {"weights", kMatrices},
                        {"outputs", tile.kBlockOutputs},
                        {"depth", tile.kChunk}}});
    });
}

template <class T, int kVec>
void list(Table& table) {
  list<T, kVec, 1>(table);
  list<T, kVec, 2>(table);
}

}  // namespace

void list_skinny_linear(Table& table) {
  list<float, kFullVec<float>>(table);
  list<float, 1>(table);
  list<bfloat16, kFullVec<bfloat16>>(table);
  list<bfloat16, 1>(table);
}

}  // namespace dlops::cuda
