// Gradients through activations and gates, with the bias gradient's first stage. M rows, N columns; a block owns
// blockDim.x packs of a row's columns and block_rows rows, which its blockDim.y groups of threads take in turn.
#include "cuda/activation.h"
#include "cuda/launcher.h"
#include "cuda/layout.h"
#include "cuda/table.h"

namespace dlops::cuda {
namespace {

constexpr RowLayout kActivation[] = {{8, 32}, {32, 8}, {256, 1}};
constexpr int kThreads = 256;
static_assert(fits(kActivation, kThreads));

// Adds the block's rows in order and leaves the sums of its columns; sum is a thread's own, of the columns from j on.
template <int kVec>
__device__ __forceinline__ void store_sums(const float (&sum)[kVec], float* out, int64_t j, int64_t width,
                                           float (&scratch)[kVec][kThreads]) {
  __syncthreads();  // the last call's readers are done
  const int thread = int(threadIdx.y * blockDim.x + threadIdx.x);
#pragma unroll
  for (int i = 0; i < kVec; ++i) scratch[i][thread] = sum[i];
  __syncthreads();
  if (threadIdx.y > 0 || j >= width) return;
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    float total = sum[i];
    for (unsigned y = 1; y < blockDim.y; ++y) total += scratch[i][y * blockDim.x + threadIdx.x];
    out[j + i] = total;
  }
}

template <class T, int kVec, bool kGate>
__global__ void __launch_bounds__(kThreads, 1) activation_backward_kernel(ActivationPass p) {
  DLOPS_SHARED(float, scratch, [kVec][kThreads]);
  const int64_t block_columns = int64_t(blockDim.x) * kVec;
  const int64_t tiles = (p.width + block_columns - 1) / block_columns;
  const int64_t block = blockIdx.x / tiles, j = blockIdx.x % tiles * block_columns + int64_t(threadIdx.x) * kVec;
  const int64_t begin = block * p.block_rows;
  const int64_t end = begin + p.block_rows < p.rows ? begin + p.block_rows : p.rows;
  float sum[kVec] = {}, sum_up[kVec] = {};
  with_activation(p.activation, p.params, [&](auto activation) {
    using A = decltype(activation);
    for (int64_t row = begin + threadIdx.y; row < end; row += blockDim.y) {
      if (j >= p.width) break;
      const auto dy = load_pack<kVec>(static_cast<const T*>(p.dy) + row * p.dy_stride + j);
      const auto x = load_pack<kVec>(static_cast<const T*>(p.x) + row * p.x_stride + j);
      float out[kVec];
      if constexpr (kGate) {
        const auto up = load_pack<kVec>(static_cast<const T*>(p.up) + row * p.up_stride + j);
        float out_up[kVec];
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          const float y = activation.value(x.get(i));
          out[i] = gradient(activation, dy.get(i) * up.get(i), A::kFromOutput ? y : x.get(i));
          out_up[i] = dy.get(i) * y;
          sum_up[i] += out_up[i];
        }
        store_global(static_cast<T*>(p.out_up) + row * p.width + j, Pack<T, kVec>::of(out_up));
      } else {
#pragma unroll
        for (int i = 0; i < kVec; ++i) out[i] = gradient(activation, dy.get(i), x.get(i));
      }
#pragma unroll
      for (int i = 0; i < kVec; ++i) sum[i] += out[i];
      store_global(static_cast<T*>(p.out) + row * p.width + j, Pack<T, kVec>::of(out));
    }
  });
  if (p.dbias) store_sums(sum, p.dbias + block * p.width, j, p.width, scratch);
  if (kGate && p.dbias_up) store_sums(sum_up, p.dbias_up + block * p.width, j, p.width, scratch);
}

template <class T>
bool all_aligned(const ActivationPass& p) {
  const int64_t size = sizeof(T);
  return aligned(p.x, p.x_stride * size) && aligned(p.up, p.up_stride * size) && aligned(p.dy, p.dy_stride * size) &&
         aligned(p.out, p.width * size) && aligned(p.out_up);
}

template <class T, int kVec, bool kGate>
const char* launch(const ActivationPass& p, void* stream) {
  const RowLayout layout = layout_for<kVec>(kActivation, p.width, kVec);
  const int64_t blocks = ceil_div(p.width, layout.threads * kVec) * ceil_div(p.rows, p.block_rows);
  DLOPS_LAUNCH((activation_backward_kernel<T, kVec, kGate>), dim3(unsigned(blocks)), dim3(layout.threads, layout.rows),
               0, static_cast<cudaStream_t>(stream), p);
  return launch_error();
}

template <bool kGate>
const char* backward(const ActivationPass& p, void* stream) {
  if (p.rows == 0 || p.width == 0) return nullptr;
  return with_dtype(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return all_aligned<T>(p) ? launch<T, kFullVec<T>, kGate>(p, stream) : launch<T, 1, kGate>(p, stream);
  });
}

}  // namespace

const char* act_backward(const ActivationPass& p, void* stream) { return backward<false>(p, stream); }
const char* gate_backward(const ActivationPass& p, void* stream) { return backward<true>(p, stream); }

int64_t activation_block_rows(const ActivationPass& p) {
  // Enough blocks to fill the device twice over. But no sum of more than kMaxRun rows in a row of float additions,
  // whose error grows with their number.
  constexpr int64_t kBlocksPerProcessor = 16, kMaxRun = 256;
  const auto [layout, vec] = with_dtype(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int kVec = kFullVec<T>;
    return all_aligned<T>(p) ? std::pair(layout_for<kVec>(kActivation, p.width, kVec), kVec)
                             : std::pair(layout_for<1>(kActivation, p.width, 1), 1);
  });
  const int64_t tiles = std::max<int64_t>(1, ceil_div(p.width, layout.threads * vec));
  const int64_t blocks = ceil_div(processors() * kBlocksPerProcessor, tiles);
  return std::clamp<int64_t>(ceil_div(ceil_div(p.rows, layout.rows), blocks), 1, kMaxRun) * layout.rows;
}

namespace {

template <class T, int kVec>
void list(Table& table) {
  for (const RowLayout& layout : kActivation)
    if (layout.threads >= kGroup<kVec>)
      table.push_back({"activation_backward",
                       {{"element_bytes", sizeof(T)},
                        {"access_bytes", kVec * sizeof(T)},
                        {"width", layout.threads == kThreads ? 0 : layout.threads * kVec},
                        {"threads", layout.threads},
                        {"rows", layout.rows}}});
}

}  // namespace

void list_activation_backward(Table& table) {
  list<float, kFullVec<float>>(table);
  list<float, 1>(table);
  list<bfloat16, kFullVec<bfloat16>>(table);
  list<bfloat16, 1>(table);
}

}  // namespace dlops::cuda
