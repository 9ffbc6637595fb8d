// Tiles of the causal convolution: how channels and steps are spread over a block, and what a step sees.
#pragma once

#include "core/activation.h"
#include "core/conv1d.h"
#include "cuda/launcher.h"
#include "cuda/layout.h"

namespace dlops::cuda {

constexpr int kConvThreads = 128;
constexpr int kPackTaps = 4;  // of packs of steps, which have no dilation and one sequence per batch element

// Where a step's sequence begins and ends. Bounds that contradict each other are followed to no other memory.
struct Span {
  int64_t sequence, begin, end;
};

__device__ __forceinline__ Span span_at(const Conv1d& p, int64_t batch, int64_t t) {
  if (!p.bounds) return {batch, 0, p.seqlen};
  int64_t low = 0, high = p.sequences - 1;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (p.bounds[middle + 1] > t)
      high = middle;
    else
      low = middle + 1;
  }
  const Sequence part = sequence_of(p, low);
  const int64_t end = part.begin + part.length;
  return {low, part.begin < t ? part.begin : t, end > t ? end : t + 1};
}

// Whether step t, which is no padding, and the step `back` before it belong together.
__device__ __forceinline__ bool same(const Conv1d& p, int64_t batch, int64_t t, int64_t back) {
  if (!p.seq_idx) return true;
  const int32_t* index = p.seq_idx + batch * p.seqlen;
  return index[t] >= 0 && index[t] == index[t > back ? t - back : 0];
}

// Whether the final states hold step t of a batch element, which may be an initial state.
__device__ __forceinline__ bool in_final(const Conv1d& p, int64_t batch, int64_t t) {
  if (!p.seq_idx || p.seqlen == 0) return true;
  const int32_t* index = p.seq_idx + batch * p.seqlen;
  const int32_t last = index[p.seqlen - 1];
  return last >= 0 && index[t > 0 ? t : 0] == last;
}

__device__ __forceinline__ int64_t back(const Conv1d& p, int64_t tap) { return (p.width - 1 - tap) * p.dilation; }

__device__ __forceinline__ float parameter(const void* data, Dtype dtype, int64_t i) {
  switch (dtype) {
    case Dtype::kBFloat16: return to_float(static_cast<const bfloat16*>(data)[i]);
    case Dtype::kFloat16: return to_float(static_cast<const float16*>(data)[i]);
    default: return static_cast<const float*>(data)[i];
  }
}

// Row `row` of a state of T, or zero where there are none.
template <class T>
__device__ __forceinline__ float state(const Conv1d& p, const void* states, int64_t sequence, int64_t channel,
                                       int64_t row) {
  return states ? to_float(static_cast<const T*>(states)[(sequence * p.channels + channel) * p.reach + row]) : 0.0f;
}

// What step t of a channel sees `back` steps before; x begins with the batch element and the channel.
template <class T>
__device__ __forceinline__ float seen(const Conv1d& p, const T* x, int64_t batch, int64_t channel, int64_t t,
                                      const Span& span, int64_t back) {
  if (!same(p, batch, t, back)) return 0.0f;
  const int64_t before = t - back;
  if (before >= span.begin) return to_float(x[before * p.x.step]);
  return state<T>(p, p.initial, span.sequence, channel, p.reach + before - span.begin);
}

// A thread has kItems packs of kVec elements. kLast: channels are adjacent in memory, threadIdx.x runs over packs of
// them and threadIdx.y over steps; else threadIdx.x runs over packs of steps and threadIdx.y over channels.
template <class T, int N, bool kChannelsLast>
struct ConvTile {
  static constexpr int kVec = N;
  static constexpr bool kLast = kChannelsLast;
  static constexpr int kX = kLast ? kGroup<kVec> : kWarp, kY = kConvThreads / kX;
  static constexpr int kItems = 4;
  static constexpr int kSums = kLast ? kVec : 1;  // channels of a thread
  static constexpr int kChannels = kLast ? kX * kVec : kY;
  static constexpr int kSteps = kItems * (kLast ? kY : kX * kVec);
  static constexpr int kTaps = !kLast && kVec > 1 ? kPackTaps : 0;  // 0: any number

  const Conv1d& p;
  int64_t block, batch, begin, channel;  // tile among those of the same channels, its first step, this thread's channel
  const T* x;

  __device__ __forceinline__ ConvTile(const Conv1d& params, int64_t steps) : p(params) {
    const int64_t columns = (p.channels + kChannels - 1) / kChannels, tiles = (p.seqlen + steps - 1) / steps;
    block = blockIdx.x / columns;
    batch = block / tiles;
    begin = block % tiles * steps;
    channel = blockIdx.x % columns * kChannels + (kLast ? threadIdx.x * kVec : threadIdx.y);
    x = at<T>(p.x);
  }

  __device__ __forceinline__ bool exists() const { return channel < p.channels; }

  // The signal's element of this thread's channel at step 0.
  template <class U, class Pointer>
  __device__ __forceinline__ U* at(const Signal<Pointer>& signal) const {
    return static_cast<U*>(const_cast<void*>(signal.data)) + batch * signal.batch + channel * signal.channel;
  }

  // Of a pack, from the tile's first step or the part of it at hand.
  __device__ __forceinline__ static int row(int item) {
    return kLast ? item * kY + int(threadIdx.y) : (item * kX + int(threadIdx.x)) * kVec;
  }

  template <class F>
  __device__ __forceinline__ void each_tap(F f) const {
    if constexpr (kTaps) {
#pragma unroll
      for (int k = 0; k < kTaps; ++k) f(k, int64_t(kTaps - 1 - k));
    } else {
#pragma unroll 1
      for (int64_t k = 0; k < p.width; ++k) f(k, back(p, k));
    }
  }

  // The weight of a tap, or the bias, of the elements of a pack.
  __device__ __forceinline__ void weight(int64_t k, float (&w)[kVec]) const {
#pragma unroll
    for (int i = 0; i < kVec; ++i)
      w[i] = i && !kLast ? w[0] : parameter(p.weight, p.weight_dtype, (channel + i) * p.width + k);
  }
  __device__ __forceinline__ void bias(float (&b)[kVec]) const {
#pragma unroll
    for (int i = 0; i < kVec; ++i)
      b[i] = !p.bias ? 0.0f : i && !kLast ? b[0] : parameter(p.bias, p.weight_dtype, channel + i);
  }

  // What a pack at step t sees `back` steps before.
  __device__ __forceinline__ void pack_seen(int64_t t, const Span& span, int64_t back, float (&v)[kVec]) const {
    if constexpr (kTaps) {
      const Pack<T, kVec> own = load_pack<kVec>(x + t), before = t > 0 ? load_pack<kVec>(x + t - kVec) : states();
#pragma unroll
      for (int i = 0; i < kVec; ++i) v[i] = i >= back ? own.get(i - back) : before.get(kVec + i - back);
    } else if constexpr (kVec == 1) {
      v[0] = seen(p, x, batch, channel, t, span, back);
    } else {
      Pack<T, kVec> pack{};
      if (same(p, batch, t, back)) {
        if (t - back >= span.begin)
          pack = load_pack<kVec>(x + (t - back) * p.x.step);
        else if (p.initial)
          pack = states(span.sequence, p.reach + t - back - span.begin);
      }
#pragma unroll
      for (int i = 0; i < kVec; ++i) v[i] = pack.get(i);
    }
  }

  // acc = bias + the taps of what each pack sees, of the packs from step `first` on that begin before `end`.
  __device__ __forceinline__ void convolve(int64_t first, int64_t end, float (&acc)[kItems][kVec]) const {
    Span span[kItems];
#pragma unroll
    for (int item = 0; item < kItems; ++item) {
      bias(acc[item]);
      if (first + row(item) < end) span[item] = span_at(p, batch, first + row(item));
    }
    each_tap([&](int64_t k, int64_t back) {
      float w[kVec];
      weight(k, w);
#pragma unroll
      for (int item = 0; item < kItems; ++item) {
        const int64_t t = first + row(item);
        if (t >= end) continue;
        float v[kVec];
        pack_seen(t, span[item], back, v);
#pragma unroll
        for (int i = 0; i < kVec; ++i) acc[item][i] += v[i] * w[i];
      }
    });
  }

 private:
  // The initial states as the pack before a channel's first.
  __device__ __forceinline__ Pack<T, kVec> states() const {
    constexpr int kReach = kPackTaps - 1;
    float v[kVec] = {};
#pragma unroll
    for (int i = 0; i < kReach; ++i) v[kVec - kReach + i] = state<T>(p, p.initial, batch, channel, i);
    return Pack<T, kVec>::of(v);
  }

  // A row of the initial states of a pack of channels.
  __device__ __forceinline__ Pack<T, kVec> states(int64_t sequence, int64_t row) const {
    float v[kVec];
#pragma unroll
    for (int i = 0; i < kVec; ++i) v[i] = state<T>(p, p.initial, sequence, channel + i, row);
    return Pack<T, kVec>::of(v);
  }
};

// Elements of the batch; none where there are no sequences.
inline int64_t batches(const Conv1d& p) { return p.bounds ? std::min<int64_t>(1, p.sequences) : p.sequences; }

// Whether a signal, if there is one, is made of packs of 16 bytes.
template <class T, class Pointer>
bool in_packs(const Conv1d& p, const Signal<Pointer>& signal) {
  const int64_t size = sizeof(T);
  return !signal.data || (aligned(signal.data, signal.batch * size) &&
                          aligned(nullptr, (p.channels_last ? signal.step : signal.channel) * size));
}

// Calls f with a null pointer to the tile that serves p; packs: whether all signals are made of them.
template <class T, class F>
auto with_tile(const Conv1d& p, bool packs, F f) {
  constexpr int kVec = kFullVec<T>;
  if (p.channels_last) {
    if (packs && p.channels % kVec == 0) return f(static_cast<ConvTile<T, kVec, true>*>(nullptr));
    return f(static_cast<ConvTile<T, 1, true>*>(nullptr));
  }
  const bool plain = p.width == kPackTaps && p.dilation == 1 && !p.seq_idx && !p.bounds;
  if (packs && plain && p.seqlen % kVec == 0) return f(static_cast<ConvTile<T, kVec, false>*>(nullptr));
  return f(static_cast<ConvTile<T, 1, false>*>(nullptr));
}

// Of all steps, for the same channels.
inline int64_t tiles(const Conv1d& p, int64_t steps) { return batches(p) * ceil_div(p.seqlen, steps); }

template <class Tile>
dim3 conv_grid(const Conv1d& p, int64_t steps) {
  return dim3(unsigned(tiles(p, steps) * ceil_div(p.channels, Tile::kChannels)));
}

}  // namespace dlops::cuda
