// Gradients of the causal convolution. A block takes a tile of steps and of channels: first it leaves dpre, the
// gradient before the activation, of these steps and of the `reach` steps that follow, in shared memory, or where there
// is not enough of it in scratch memory; then dx, and the tile's row of partial sums for the weight and the bias.
#include "cuda/conv1d.h"
#include "cuda/conv1d_tile.h"

namespace dlops::cuda {
namespace {

// dpre of a tile: rows of channels where these are adjacent in memory, else rows of steps.
template <class Tile>
struct Gradients {
  int64_t rows, stride;  // steps of a tile and those that follow; floats from one row to the next

  __host__ __device__ Gradients(int64_t steps, int64_t reach) : rows(steps + reach) {
    stride = Tile::kLast ? Tile::kChannels : steps + (reach + Tile::kVec - 1) / Tile::kVec * Tile::kVec;
  }
  __host__ __device__ int64_t floats() const { return stride * (Tile::kLast ? rows : Tile::kChannels); }

  // Of this thread's channels and a row of the tile.
  __device__ __forceinline__ float* at(float* dpre, int64_t row) const {
    return dpre + (Tile::kLast ? row * stride + threadIdx.x * Tile::kVec : threadIdx.y * stride + row);
  }
};

// Adjacent floats of dpre: one, or from a multiple of four on.
template <int kCount>
__device__ __forceinline__ void read(const float* from, float (&v)[kCount]) {
  constexpr int kWide = kCount == 1 ? 1 : 4;
#pragma unroll
  for (int i = 0; i < kCount; i += kWide) {
    const auto pack = load_pack<kWide>(from + i);
#pragma unroll
    for (int j = 0; j < kWide; ++j) v[i + j] = pack.get(j);
  }
}

template <int kCount>
__device__ __forceinline__ void write(float* to, const float (&v)[kCount]) {
  constexpr int kWide = kCount == 1 ? 1 : 4;
#pragma unroll
  for (int i = 0; i < kCount; i += kWide) {
    float part[kWide];
#pragma unroll
    for (int j = 0; j < kWide; ++j) part[j] = v[i + j];
    store_pack(to + i, Pack<float, kWide>::of(part));
  }
}

// The sum of a thread's terms over the block's steps, by channel, for the threads that then call store(i, sum). Every
// thread must call this.
template <class Tile, class Store>
__device__ __forceinline__ void sum_steps(double (&sum)[Tile::kSums], double (&scratch)[Tile::kSums][kConvThreads],
                                          Store store) {
  if constexpr (Tile::kLast) {
    __syncthreads();  // the last call's readers are done
#pragma unroll
    for (int i = 0; i < Tile::kSums; ++i) scratch[i][threadIdx.y * Tile::kX + threadIdx.x] = sum[i];
    __syncthreads();
    if (threadIdx.y > 0) return;
#pragma unroll
    for (int i = 0; i < Tile::kSums; ++i) {
      for (int y = 1; y < Tile::kY; ++y) sum[i] += scratch[i][y * Tile::kX + threadIdx.x];
      store(i, float(sum[i]));
    }
  } else {
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) sum[0] += __shfl_xor_sync(0xffffffffu, sum[0], lanes);
    if (threadIdx.x == 0) store(0, float(sum[0]));
  }
}

template <class T, int kVec, bool kLast>
__global__ void __launch_bounds__(kConvThreads, 1) conv1d_backward_kernel(Conv1dBackward p, int64_t steps) {
  using Tile = ConvTile<T, kVec, kLast>;
  constexpr int kItems = Tile::kItems;
  DLOPS_SHARED(double, scratch, [Tile::kSums][kConvThreads]);
  DLOPS_DYNAMIC_SHARED(float, shared);
  const Tile tile(p, steps);
  const Gradients<Tile> gradients(steps, p.reach);
  float* const dpre = p.scratch ? p.scratch + blockIdx.x * gradients.floats() : shared;
  const int64_t left = tile.exists() ? p.seqlen - tile.begin : 0;
  const int64_t count = left < steps ? left : steps, rows = count + p.reach;  // of this tile; with those that follow

  const T* dy = tile.template at<const T>(p.dy);
#pragma unroll 1
  for (int64_t base = 0; base < rows; base += Tile::kSteps) {
    float pre[kItems][kVec];
    const int64_t end = left < rows ? left : rows;
    if (p.silu && left > 0) tile.convolve(tile.begin + base, tile.begin + end, pre);
#pragma unroll
    for (int item = 0; item < kItems; ++item) {
      const int64_t row = base + tile.row(item), t = tile.begin + row;
      if (row >= rows) continue;
      float d[kVec] = {};
      if (row < left && same(p, tile.batch, t, 0)) {
        const auto pack = load_pack<kVec>(dy + t * (kLast ? p.dy.step : 1));
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          d[i] = pack.get(i);
          if (p.silu) d[i] *= Silu(nullptr).slope(pre[item][i]);
        }
      }
      write(gradients.at(dpre, row), d);
    }
  }
  __syncthreads();

  // Calls f(row, t) for kItems of this thread's packs, of the tile's steps from `base` on.
  const auto each_pack = [&](int64_t base, auto f) {
#pragma unroll
    for (int item = 0; item < kItems; ++item) {
      const int64_t row = base + tile.row(item);
      if (row < count) f(row, tile.begin + row);
    }
  };
  // The sums over the tile's steps of term(row, t, sum), which adds a pack's terms: a few in float, these in double.
  const auto sums = [&](auto term, auto store) {
    double sum[Tile::kSums] = {};
#pragma unroll 1
    for (int64_t base = 0; base < count; base += Tile::kSteps) {
      float part[kVec] = {};
      each_pack(base, [&](int64_t row, int64_t t) { term(row, t, part); });
#pragma unroll
      for (int i = 0; i < kVec; ++i) sum[i % Tile::kSums] += part[i];
    }
    sum_steps<Tile>(sum, scratch, [&](int i, float total) {
      if (tile.exists()) store(tile.block * p.channels + tile.channel + i, total);
    });
  };
  if (p.dx.data) {
    T* dx = tile.template at<T>(p.dx);
#pragma unroll 1
    for (int64_t base = 0; base < count; base += Tile::kSteps)
      each_pack(base, [&](int64_t row, int64_t t) {
        const Span span = span_at(p, tile.batch, t);
        const bool held = p.dfinal && t + (kLast ? 1 : kVec) > span.end - p.reach && in_final(p, tile.batch, t);
        float sum[kVec] = {};
        if (held) {
#pragma unroll
          for (int i = 0; i < kVec; ++i) {
            const int64_t at = (kLast ? t : t + i) - span.end + p.reach;
            if (at >= 0) sum[i] = state<T>(p, p.dfinal, span.sequence, tile.channel + (kLast ? i : 0), at);
          }
        }
        float next[Tile::kTaps ? kVec + 4 : kVec];
        if constexpr (Tile::kTaps) read(gradients.at(dpre, row), next);
        tile.each_tap([&](int64_t k, int64_t back) {
          float w[kVec];
          tile.weight(k, w);
          if constexpr (!Tile::kTaps) {
            if (t + back >= span.end || !same(p, tile.batch, t + back, back)) return;
            read(gradients.at(dpre, row + back), next);
          }
#pragma unroll
          for (int i = 0; i < kVec; ++i) sum[i] += next[Tile::kTaps ? i + back : i] * w[i];
        });
        store_global(dx + t * (kLast ? p.dx.step : 1), Pack<T, kVec>::of(sum));
      });
  }
  if (p.dbias)
    sums(
        [&](int64_t row, int64_t, float (&sum)[kVec]) {
          float d[kVec];
          read(gradients.at(dpre, row), d);
#pragma unroll
          for (int i = 0; i < kVec; ++i) sum[i] += d[i];
        },
        [&](int64_t channel, float total) { p.dbias[channel] = total; });
  if (!p.dweight) return;
  tile.each_tap([&](int64_t k, int64_t back) {
    sums(
        [&](int64_t row, int64_t t, float (&sum)[kVec]) {
          float d[kVec], v[kVec];
          read(gradients.at(dpre, row), d);
          tile.pack_seen(t, span_at(p, tile.batch, t), back, v);
#pragma unroll
          for (int i = 0; i < kVec; ++i) sum[i] += d[i] * v[i];
        },
        [&](int64_t channel, float total) { p.dweight[channel * p.width + k] = total; });
  });
}

// What the initial states receive from the steps that see them, and from the final states that hold them. A thread
// takes one element at a time, and computes dpre of those steps again.
template <class T>
__global__ void __launch_bounds__(kConvThreads, 1) conv1d_initial_kernel(Conv1dBackward p) {
  const int64_t count = p.sequences * p.channels * p.reach;
  for (int64_t e = int64_t(blockIdx.x) * kConvThreads + threadIdx.x; e < count;
       e += int64_t(gridDim.x) * kConvThreads) {
    const int64_t row = e % p.reach, channel = e / p.reach % p.channels, sequence = e / p.reach / p.channels;
    const Sequence part = sequence_of(p, sequence);
    const T* x = begin_of<T>(p, p.x, sequence, part, channel);
    const T* dy = begin_of<T>(p, p.dy, sequence, part, channel);
    const Span span{sequence, 0, part.length};
    const auto weight = [&](int64_t k) { return parameter(p.weight, p.weight_dtype, channel * p.width + k); };
    float sum = 0;
    if (row >= part.length && in_final(p, sequence, row - p.reach))
      sum = state<T>(p, p.dfinal, sequence, channel, row - part.length);
    for (int64_t k = 0; k < p.width; ++k) {
      const int64_t t = row - p.reach + back(p, k);
      if (t < 0 || t >= part.length || !same(p, sequence, t, t)) continue;
      float d = to_float(dy[t * p.dy.step]);
      if (p.silu) {
        float pre = p.bias ? parameter(p.bias, p.weight_dtype, channel) : 0.0f;
        for (int64_t j = 0; j < p.width; ++j) pre += seen(p, x, sequence, channel, t, span, back(p, j)) * weight(j);
        d *= Silu(nullptr).slope(pre);
      }
      sum += d * weight(k);
    }
    static_cast<T*>(p.dinitial)[e] = from_float<T>(sum);
  }
}

constexpr int64_t kSharedBytes = 40 * 1024;  // of dpre; with the sums that is what every launch may have

// The steps of a tile, and whether their dpre fits shared memory. Where that of the steps which follow takes too much
// of it, there are at least as many of the tile's own.
struct TileSteps {
  int64_t steps;
  bool shared;
};

template <class Tile>
TileSteps tile_steps(const Conv1d& p) {
  const int64_t steps = std::max(Tile::kSteps, Tile::kLast ? 64 : 512);
  if (Gradients<Tile>(steps, p.reach).floats() * int64_t(sizeof(float)) <= kSharedBytes) return {steps, true};
  return {ceil_div(std::max(steps, p.reach), steps) * steps, false};
}

template <class F>
auto with_backward_tile(const Conv1dBackward& p, F f) {
  return with_dtype(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const bool packs = in_packs<T>(p, p.x) && in_packs<T>(p, p.dy) && in_packs<T>(p, p.dx);
    return with_tile<T>(p, packs, f);
  });
}

template <class T, int kVec, bool kLast>
const char* launch(const Conv1dBackward& p, ConvTile<T, kVec, kLast>*, cudaStream_t stream) {
  using Tile = ConvTile<T, kVec, kLast>;
  if (batches(p) * p.channels * p.seqlen > 0 && (p.dx.data || p.dweight || p.dbias)) {
    const auto [steps, in_shared] = tile_steps<Tile>(p);
    const int64_t shared = in_shared ? Gradients<Tile>(steps, p.reach).floats() * int64_t(sizeof(float)) : 0;
    const auto kernel = conv1d_backward_kernel<T, kVec, kLast>;
    DLOPS_LAUNCH(kernel, conv_grid<Tile>(p, steps), dim3(Tile::kX, Tile::kY), size_t(shared), stream, p, steps);
    if (const char* error = launch_error()) return error;
  }
  const int64_t states = p.sequences * p.channels * p.reach;
  if (!p.dinitial || states == 0) return nullptr;
  const int64_t blocks = std::min(ceil_div(states, kConvThreads), kMaxGrid);
  DLOPS_LAUNCH(conv1d_initial_kernel<T>, dim3(unsigned(blocks)), dim3(kConvThreads), 0, stream, p);
  return launch_error();
}

}  // namespace

int64_t conv1d_blocks(const Conv1dBackward& p) {
  return with_backward_tile(p, [&](auto* tile) {
    using Tile = std::remove_pointer_t<decltype(tile)>;
    return tiles(p, tile_steps<Tile>(p).steps);
  });
}

int64_t conv1d_scratch(const Conv1dBackward& p) {
  return with_backward_tile(p, [&](auto* tile) {
    using Tile = std::remove_pointer_t<decltype(tile)>;
    const auto [steps, shared] = tile_steps<Tile>(p);
    const int64_t blocks = tiles(p, steps) * ceil_div(p.channels, Tile::kChannels);
    return shared ? 0 : blocks * Gradients<Tile>(steps, p.reach).floats();
  });
}

const char* conv1d_backward(const Conv1dBackward& p, void* stream) {
  return with_backward_tile(p, [&](auto* tile) { return launch(p, tile, static_cast<cudaStream_t>(stream)); });
}

}  // namespace dlops::cuda
