// What the scans of both directions share. A channel has kLanes adjacent lanes of a warp, which keep kStates of its
// states each in registers. A block has adjacent channels of one group, and stages kSteps of their steps, and of B and
// C, in shared memory.
#pragma once

#include "cuda/launcher.h"
#include "cuda/scan.h"

namespace dlops::cuda {

constexpr int kScanThreads = 128;

template <int kLanes_, int kStates_, int kSteps_>
struct ScanShape {
  static constexpr int kLanes = kLanes_, kStates = kStates_, kSteps = kSteps_;
  static constexpr int kWidth = kLanes * kStates, kChannels = kScanThreads / kLanes;
};

// f(shape) with the narrowest shape that holds the states.
template <class F>
auto with_shape(int64_t states, F f) {
  if (states <= 16) return f(ScanShape<4, 4, 16>{});
  if (states <= 64) return f(ScanShape<16, 4, 16>{});
  return f(ScanShape<32, 8, 8>{});
}

// The channels and the steps of a block, and the channel and the lane of this thread. A block of more channels than
// threads serve takes them in turns.
template <class Shape>
struct ScanBlock {
  int64_t batch, group, number;  // number: among the group's blocks
  int64_t first, channels;       // of this turn; none after the last
  int64_t chunk, begin, end;     // without a split all steps
  int column, lane;

  __device__ ScanBlock(const Scan& p, bool split, int turn = 0) {
    const int64_t per_group = p.dim / p.groups, chunks = split ? p.chunks() : 1;
    int64_t i = blockIdx.x;
    chunk = i % chunks, i /= chunks;
    number = i % p.blocks(), i /= p.blocks();
    group = i % p.groups, batch = i / p.groups;
    const int64_t before = number * p.block + turn * Shape::kChannels;
    const int64_t left = (p.block < per_group - number * p.block ? (number + 1) * p.block : per_group) - before;
    first = group * per_group + before;
    channels = left < Shape::kChannels ? left : Shape::kChannels;
    begin = split ? chunk * p.chunk : 0;
    end = split && begin + p.chunk < p.steps ? begin + p.chunk : p.steps;
    column = int(threadIdx.x) / Shape::kLanes, lane = int(threadIdx.x) % Shape::kLanes;
  }

  __device__ int64_t channel() const { return first + column; }
  __device__ bool there() const { return column < channels; }
};

// Blocks of so many channels; chunks side by side where there are few of them.
inline ScanPlan plan_of(Scan p, int64_t block) {
  constexpr int64_t kBlocksPerProcessor = 8;
  p.block = block;
  return {block, p.steps > p.chunk && p.tasks() < processors() * kBlocksPerProcessor};
}

// f(index, r) over this thread's states that there are, index among the channel's.
template <class Shape, class F>
__device__ __forceinline__ void each_state(const Scan& p, int lane, F f) {
#pragma unroll
  for (int r = 0; r < Shape::kStates; ++r)
    if (lane * Shape::kStates + r < p.states) f(int64_t(lane * Shape::kStates + r), r);
}

// The states at `from` ((dim, states), or null: zeros) of this thread's channel.
template <class Shape>
__device__ __forceinline__ void load_states(const Scan& p, const ScanBlock<Shape>& block, const float* from,
                                            float (&to)[Shape::kStates]) {
#pragma unroll
  for (int r = 0; r < Shape::kStates; ++r) to[r] = 0;
  if (from && block.there())
    each_state<Shape>(p, block.lane, [&](int64_t n, int r) { to[r] = from[block.channel() * p.states + n]; });
}

template <class Shape>
__device__ __forceinline__ void store_states(const Scan& p, const ScanBlock<Shape>& block,
                                             const float (&from)[Shape::kStates], float* to) {
  if (block.there())
    each_state<Shape>(p, block.lane, [&](int64_t n, int r) { to[block.channel() * p.states + n] = from[r]; });
}

// f(step, column) over `steps` steps of the block's channels, for all threads together: adjacent threads take adjacent
// memory of a tensor whose elements are `stride` apart from step to step.
template <class Shape, class F>
__device__ __forceinline__ void each_element(const ScanBlock<Shape>& block, int steps, int64_t stride, F f) {
  for (int i = int(threadIdx.x); i < Shape::kSteps * Shape::kChannels; i += kScanThreads) {
    const int t = stride == 1 ? i % Shape::kSteps : i / Shape::kChannels;
    const int c = stride == 1 ? i / Shape::kSteps : i % Shape::kChannels;
    if (t < steps && c < block.channels) f(t, c);
  }
}

// Of kSteps steps: a number for each channel, and all states. The padding keeps both orders of access from meeting in
// one bank.
template <class Shape>
using ChannelSteps = float[Shape::kSteps][Shape::kChannels + 1];
template <class Shape>
using StateSteps = float[Shape::kSteps][Shape::kWidth];

template <class T>
__device__ __forceinline__ float load_element(const ScanTensor& x, int64_t batch, int64_t channel, int64_t step) {
  return to_float(static_cast<const T*>(x.data)[batch * x.batch + channel * x.channel + step * x.step]);
}

template <class T>
__device__ __forceinline__ void store_element(const ScanOutput& x, int64_t batch, int64_t channel, int64_t step,
                                              float value) {
  static_cast<T*>(x.data)[batch * x.batch + channel * x.channel + step * x.step] = from_float<T>(value);
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// The step size, from what delta holds.
__device__ __forceinline__ float step_size(const Scan& p, float raw) {
  return !p.delta_softplus || raw > 20.0f ? raw : log1pf(expf(raw));
}

template <class T>
__device__ __forceinline__ float raw_step(const Scan& p, int64_t batch, int64_t channel, int64_t step) {
  return load_element<T>(p.delta, batch, channel, step) + (p.delta_bias ? p.delta_bias[channel] : 0.0f);
}

// B or C of `steps` steps from `begin` on; zeros for states that are not there. One that does not vary stays in
// registers (load_states).
template <class T, class Shape>
__device__ __forceinline__ void stage(const Scan& p, const ScanBlock<Shape>& block, const ScanCoefficient& x,
                                      int64_t begin, int steps, StateSteps<Shape>& to) {
  if (!x.varies) return;
  const T* from = static_cast<const T*>(x.data) + block.batch * x.batch + block.group * x.group + begin * x.step;
  for (int i = int(threadIdx.x); i < Shape::kSteps * Shape::kWidth; i += kScanThreads) {
    const int t = x.step == 1 ? i % Shape::kSteps : i / Shape::kWidth;
    const int n = x.step == 1 ? i / Shape::kSteps : i % Shape::kWidth;
    to[t][n] = t < steps && n < p.states ? to_float(from[t * x.step + n * x.state]) : 0.0f;
  }
}

// This lane's part of a staged coefficient.
template <class Shape>
__device__ __forceinline__ void read(const ScanCoefficient& x, const StateSteps<Shape>& staged, int t, int lane,
                                     float (&to)[Shape::kStates]) {
  if (!x.varies) return;
#pragma unroll
  for (int r = 0; r < Shape::kStates; ++r) to[r] = staged[t][lane * Shape::kStates + r];
}

template <class Shape>
__device__ __forceinline__ float sum_lanes(float x) {
  return warp_sum(x, Shape::kLanes);
}

// The sequence that a step belongs to; of several that begin there the one that is not empty. The bounds' values are
// not to be trusted: where they end too early or begin too late, the last or the first sequence takes the steps.
struct ScanSequence {
  const int32_t* bounds;
  int64_t count, steps;
  int64_t index, begin, end;

  __device__ ScanSequence(const Scan& p, int64_t batch, int64_t step)
      : bounds(p.cu_seqlens), count(p.sequences), steps(p.steps), index(batch), begin(0), end(p.steps) {
    if (!bounds) return;
    int64_t low = 0, high = p.sequences;  // bounds[low] <= step < bounds[high]
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (bounds[middle] <= step ? low : high) = middle;
    }
    set(low);
  }

  __device__ void set(int64_t i) {
    index = i;
    begin = bounds[i], end = bounds[i + 1];
  }
  __device__ void next() {
    while (index + 1 < count) {
      set(index + 1);
      if (end > begin) return;
    }
    end = steps;
  }
  __device__ void previous() {
    while (index > 0) {
      set(index - 1);
      if (end > begin) return;
    }
    begin = 0;
  }
};

// Copies the states of sequences without steps, once per channel: `from` or zeros.
template <class Shape>
__device__ __forceinline__ void copy_empty(const Scan& p, const ScanBlock<Shape>& block, const float* from, float* to) {
  if (!to || block.chunk > 0) return;
  const int64_t size = p.dim * p.states;
  for (int64_t i = p.cu_seqlens ? 0 : block.batch; i < (p.cu_seqlens ? p.sequences : block.batch + 1); ++i) {
    if (p.cu_seqlens ? p.cu_seqlens[i] != p.cu_seqlens[i + 1] : p.steps > 0) continue;
    float h[Shape::kStates];
    load_states(p, block, from ? from + i * size : nullptr, h);
    store_states(p, block, h, to + i * size);
  }
}

}  // namespace dlops::cuda
