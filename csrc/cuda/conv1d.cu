// Causal depthwise convolution. A block takes a tile of steps of a batch element and of channels; every tap is a load
// of its own, which the L1 cache serves after the first.
#include "cuda/conv1d.h"
#include "cuda/conv1d_tile.h"

namespace dlops::cuda {
namespace {

template <class T, int kVec, bool kLast>
__global__ void __launch_bounds__(kConvThreads) conv1d_kernel(Conv1dForward p) {
  using Tile = ConvTile<T, kVec, kLast>;
  const Tile tile(p, Tile::kSteps);
  if (!tile.exists()) return;
  float acc[Tile::kItems][kVec];
  tile.convolve(tile.begin, p.seqlen, acc);
  T* y = tile.template at<T>(p.y);
#pragma unroll
  for (int item = 0; item < Tile::kItems; ++item) {
    const int64_t t = tile.begin + tile.row(item);
    if (t >= p.seqlen) continue;
    const bool present = same(p, tile.batch, t, 0);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      if (p.silu) acc[item][i] = Silu(nullptr).value(acc[item][i]);
      if (!present) acc[item][i] = 0;
    }
    store_global(y + t * (kLast ? p.y.step : 1), Pack<T, kVec>::of(acc[item]));
  }
}

// The last `reach` steps of each sequence, initial states included; a thread takes one element at a time.
template <class T>
__global__ void __launch_bounds__(kConvThreads, 1) conv1d_final_kernel(Conv1dForward p) {
  const int64_t count = p.sequences * p.channels * p.reach;
  for (int64_t e = int64_t(blockIdx.x) * kConvThreads + threadIdx.x; e < count;
       e += int64_t(gridDim.x) * kConvThreads) {
    const int64_t row = e % p.reach, channel = e / p.reach % p.channels, sequence = e / p.reach / p.channels;
    const Sequence part = sequence_of(p, sequence);
    const int64_t step = part.length - p.reach + row;
    float value = 0;
    if (in_final(p, sequence, step)) {
      if (step >= 0)
        value = to_float(begin_of<T>(p, p.x, sequence, part, channel)[step * p.x.step]);
      else
        value = state<T>(p, p.initial, sequence, channel, p.reach + step);
    }
    static_cast<T*>(p.final)[e] = from_float<T>(value);
  }
}

template <class T, int kVec, bool kLast>
const char* launch(const Conv1dForward& p, ConvTile<T, kVec, kLast>*, cudaStream_t stream) {
  using Tile = ConvTile<T, kVec, kLast>;
  const auto kernel = conv1d_kernel<T, kVec, kLast>;
  DLOPS_LAUNCH(kernel, conv_grid<Tile>(p, Tile::kSteps), dim3(Tile::kX, Tile::kY), 0, stream, p);
  return launch_error();
}

}  // namespace

const char* conv1d_forward(const Conv1dForward& p, void* stream) {
  return with_dtype(p.dtype, [&](auto* type) -> const char* {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto s = static_cast<cudaStream_t>(stream);
    const char* error = nullptr;
    if (batches(p) * p.channels * p.seqlen > 0) {
      const bool packs = in_packs<T>(p, p.x) && in_packs<T>(p, p.y);
      error = with_tile<T>(p, packs, [&](auto* tile) { return launch(p, tile, s); });
    }
    const int64_t states = p.sequences * p.channels * p.reach;
    if (error || !p.final || states == 0) return error;
    const int64_t blocks = std::min(ceil_div(states, kConvThreads), kMaxGrid);
    DLOPS_LAUNCH(conv1d_final_kernel<T>, dim3(unsigned(blocks)), dim3(kConvThreads), 0, s, p);
    return launch_error();
  });
}

}  // namespace dlops::cuda
