// What csrc/bind passes to the causal convolution kernels of any device. Sequences of L steps, D channels, W taps; a
// step depends on `reach` steps before it, which are its sequence's states where it has none.
#pragma once

#include "core/dtype.h"

namespace dlops {

// A (sequences or 1, D, L) tensor. Either its channels or its steps are adjacent: Conv1d::channels_last says which.
template <class Pointer>
struct Signal {
  Pointer data = nullptr;
  int64_t batch = 0, channel = 0, step = 0;  // elements from one to the next
};

struct Conv1d {
  Dtype dtype, weight_dtype;  // of weight and bias
  int64_t sequences, channels, seqlen, width, dilation, reach;
  bool silu, channels_last;
  const int32_t* bounds;   // (sequences + 1): sequences of different lengths in one batch element, or null
  const int32_t* seq_idx;  // (sequences, L) or null: steps see those of equal index, and nothing where it is negative
  Signal<const void*> x;
  const void* weight;   // (D, W), the last tap meets the present step
  const void* bias;     // (D) or null
  const void* initial;  // (sequences, D, reach), or null for zeros
};

struct Conv1dForward : Conv1d {
  Signal<void*> y;
  void* final;  // (sequences, D, reach), or null when not asked for
};

struct Conv1dBackward : Conv1d {
  Signal<const void*> dy;
  const void* dfinal;  // (sequences, D, reach) or null
  Signal<void*> dx;    // null when not asked for, like all that follow
  void* dinitial;      // (sequences, D, reach)
  int64_t blocks;      // of sequences and steps, each with its own row of the partial sums
  float* dweight;      // (blocks, D, W) partial sums
  float* dbias;        // (blocks, D)
  float* scratch;      // as many as the device asked for, or null
};

inline namespace DLOPS_ISA {

// Where a sequence begins, and its length. Bounds beyond the tensor are not followed.
struct Sequence {
  int64_t begin, length;
};

DLOPS_HD Sequence sequence_of(const Conv1d& p, int64_t sequence) {
  if (!p.bounds) return {0, p.seqlen};
  const int64_t low = p.bounds[sequence], high = p.bounds[sequence + 1];
  const int64_t begin = low < 0 ? 0 : low > p.seqlen ? p.seqlen : low;
  const int64_t end = high < begin ? begin : high > p.seqlen ? p.seqlen : high;
  return {begin, end - begin};
}

// The signal's elements of a sequence and a channel, from its first step on.
template <class T, class Pointer>
DLOPS_HD auto begin_of(const Conv1d& p, const Signal<Pointer>& signal, int64_t sequence, const Sequence& part,
                       int64_t channel) {
  const int64_t offset = (p.bounds ? part.begin * signal.step : sequence * signal.batch) + channel * signal.channel;
  if constexpr (__is_same(Pointer, const void*))
    return static_cast<const T*>(signal.data) + offset;
  else
    return static_cast<T*>(signal.data) + offset;
}

}  // namespace DLOPS_ISA
}  // namespace dlops
