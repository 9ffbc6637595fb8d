// What the selective scan's forward and backward share. kLanes channels go through a segment of steps together: `Lanes`
// arrays are (steps or states, kLanes). The states advance kTile at a time, in registers. S is a state: a vfloat, or a
// Complex whose two parts lie `part` floats apart.
#pragma once

#include "core/math.h"
#include "cpu/lanes.h"

namespace dlops {
inline namespace DLOPS_ISA {
namespace {

constexpr int64_t kSegment = 64;  // steps that the forward stages at once

// ---- states --------------------------------------------------------------------------------------------------------

template <class S>
constexpr int kTile = 4 / kParts<S>;

template <class S>
DLOPS_HD S broadcast(const float* p, int64_t part) {
  if constexpr (kIsComplex<S>)
    return {splat<vfloat>(p[0]), splat<vfloat>(p[part])};
  else
    return splat<vfloat>(p[0]);
}

// What rounding left of a * b: with fused multiply-add exactly, else zero. The copies keep the products apart.
DLOPS_HD vfloat remainder(vfloat a, vfloat b, vfloat product) { return rounded(a) * b - product; }

// exp(delta A) of kCount states, from rates that are log2(e) A in two parts: an error of theirs would be the same at
// every step, and add up.
template <class S, int kCount>
struct Decay;

DLOPS_HD void scale_rate(vfloat A, float factor, float factor_low, vfloat& high, vfloat& low) {
  high = rounded(A * factor);
  low = remainder(A, splat<vfloat>(factor), high) + A * factor_low;
  low = vselect(low == low, low, vfloat{});  // of an infinite A
}

template <int kCount>
struct Decay<vfloat, kCount> {
  vfloat rate[kCount], low[kCount];

  DLOPS_HD void prepare(int i, vfloat A) { scale_rate(A, 1.44269502f, 1.92596299e-8f, rate[i], low[i]); }

  template <bool kNear>
  DLOPS_HD void apply(vfloat delta, vfloat (&a)[kCount]) const {
    exp2<kNear>(delta, rate, low, a);
  }
};

template <int kCount>
struct Decay<Complex, kCount> {
  vfloat rate[kCount], low[kCount], turns[kCount], turns_low[kCount];  // the phase in turns

  DLOPS_HD void prepare(int i, Complex A) {
    scale_rate(A.re, 1.44269502f, 1.92596299e-8f, rate[i], low[i]);
    scale_rate(A.im, 0.159154937f, 6.42063836e-9f, turns[i], turns_low[i]);
  }

  template <bool kNear>
  DLOPS_HD void apply(vfloat delta, Complex (&a)[kCount]) const {
    vfloat size[kCount];
    exp2<kNear>(delta, rate, low, size);
    for (int i = 0; i < kCount; ++i) {
      const vfloat angle = rounded(delta * turns[i]);
      const auto [cos, sin] = cos_sin_turns(angle, remainder(delta, turns[i], angle) + delta * turns_low[i]);
      a[i] = Complex{cos, sin} * size[i];
    }
  }
};

// ---- staging -------------------------------------------------------------------------------------------------------

// (channels, states) contiguous, as A and the states are kept, to Lanes and back; a null source is zero.
template <class S>
void load_states(const float* p, int64_t states, int lanes, float* out) {
  constexpr int64_t kPer = kParts<S>;
  if (!p) {
    __builtin_memset(out, 0, kPer * states * kLanes * sizeof(float));
    return;
  }
  for (int part = 0; part < kPer; ++part)
    load_lanes(p + part, kPer * states, kPer, lanes, states, out + part * states * kLanes);
}

template <class S>
void store_states(float* p, int64_t states, int lanes, const float* in) {
  constexpr int64_t kPer = kParts<S>;
  for (int part = 0; part < kPer; ++part)
    store_lanes(p + part, kPer * states, kPer, lanes, states, in + part * states * kLanes);
}

DLOPS_HD int64_t padded(int64_t states) { return (states + kLanes - 1) / kLanes * kLanes; }

// Rows [begin, end) of a B or C that varies: (steps, parts, padded(states)).
template <class S, class T>
void load_coefficient(const Scan& p, const ScanCoefficient& c, int64_t batch, int64_t group, int64_t begin, int64_t end,
                      float* out) {
  using Element = std::conditional_t<kIsComplex<S>, float, T>;
  constexpr int64_t kPer = kParts<S>;
  const int64_t width = padded(p.states);
  const Element* from =
      static_cast<const Element*>(c.data) + kPer * (batch * c.batch + group * c.group + begin * c.step);
  for (int part = 0; part < kPer; ++part)
    for (int64_t n = 0; n < p.states; n += kLanes)
      load_lanes(from + part + n * kPer * c.state, kPer * c.state, kPer * c.step,
                 int(p.states - n < kLanes ? p.states - n : kLanes), end - begin, out + part * width + n, kPer * width);
}

// ---- the recurrence ------------------------------------------------------------------------------------------------

// B or C of state n at step t: broadcast from staged rows if it varies, else Lanes.
struct Coefficient {
  const float* data;
  int64_t step, part;
  template <class S, bool kVaries>
  DLOPS_HD S at(int64_t t, int64_t n) const {
    if constexpr (kVaries)
      return broadcast<S>(data + t * step + n, part);
    else
      return load_state<S>(data + n * kLanes, part);
  }
};

// Lanes arrays of a segment.
struct Steps {
  int64_t count;
  const float *delta, *input;  // input = delta u
  float* y;                    // C . h is added
  vfloat reach;                // the largest |delta|
};

// C . h; of a complex state with its conjugate
DLOPS_HD vfloat product(vfloat c, vfloat h) { return c * h; }
DLOPS_HD vfloat product(Complex c, Complex h) { return (c.re * h.re - c.im * h.im) * 2.0f; }

// kCount states through a segment. `kept`, if the backward asks for it, takes the states before the first step in its
// first row of kCount pairs, then per step exp(delta A) and the states after it.
template <class S, int kCount, bool kVariesB, bool kVariesC, bool kKeep, bool kNear>
void advance(const Steps s, const Decay<S, kCount>& decay, float* state, int64_t part, Coefficient B, Coefficient C,
             int64_t n, float* kept) {
  constexpr int64_t kOne = kParts<S> * kLanes;
  S h[kCount];
  for (int i = 0; i < kCount; ++i) {
    h[i] = load_state<S>(state + (n + i) * kLanes, part);
    if constexpr (kKeep) store_state(kept + (2 * i + 1) * kOne, kLanes, h[i]);
  }
  for (int64_t t = 0; t < s.count; ++t) {
    const vfloat delta = load(s.delta + t * kLanes, Full{}), input = load(s.input + t * kLanes, Full{});
    vfloat y{};  // of these states: few are added to each other before they join the others
    S a[kCount];
    decay.template apply<kNear>(delta, a);
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) {
      h[i] = a[i] * h[i] + B.at<S, kVariesB>(t, n + i) * input;
      y += product(C.at<S, kVariesC>(t, n + i), h[i]);
      if constexpr (kKeep) {
        float* row = kept + ((t + 1) * kCount + i) * 2 * kOne;
        store_state(row, kLanes, a[i]);
        store_state(row + kOne, kLanes, h[i]);
      }
    }
    store(s.y + t * kLanes, load(s.y + t * kLanes, Full{}) + y, Full{});
  }
  for (int i = 0; i < kCount; ++i) store_state(state + (n + i) * kLanes, part, h[i]);
}

// The same; a segment whose exponents are all moderate, as they are in practice, takes the shorter exp2.
template <class S, int kCount, bool kVariesB, bool kVariesC, bool kKeep>
DLOPS_HD void advance(const Steps& s, const float* A, float* state, int64_t part, Coefficient B, Coefficient C,
                      int64_t n, float* kept) {
  Decay<S, kCount> decay;
  vint near = vint{} - 1;
  for (int i = 0; i < kCount; ++i) {
    decay.prepare(i, load_state<S>(A + (n + i) * kLanes, part));
    near &= absolute(decay.rate[i]) * s.reach <= 126.0f;
  }
  if (all(near))
    advance<S, kCount, kVariesB, kVariesC, kKeep, true>(s, decay, state, part, B, C, n, kept);
  else
    advance<S, kCount, kVariesB, kVariesC, kKeep, false>(s, decay, state, part, B, C, n, kept);
}

// f(count, n) over all states, kTile at a time.
template <class S, class F>
DLOPS_HD void for_tiles(int64_t states, F f) {
  int64_t n = 0;
  for (; n + kTile<S> <= states; n += kTile<S>) f(std::integral_constant<int, kTile<S>>{}, n);
  for (; n < states; ++n) f(std::integral_constant<int, 1>{}, n);
}

// f(B varies, C varies) with compile-time booleans.
template <class F>
DLOPS_HD void for_kinds(const Scan& p, F f) {
  using Yes = std::true_type;
  using No = std::false_type;
  if (p.B.varies)
    p.C.varies ? f(Yes{}, Yes{}) : f(Yes{}, No{});
  else
    p.C.varies ? f(No{}, Yes{}) : f(No{}, No{});
}

// ---- tasks ---------------------------------------------------------------------------------------------------------

// The channels [channel, channel + channels) of one batch element, all of one group.
struct Block {
  int64_t index, batch, group, channel, channels;
  Block(const Scan& p, int64_t task) {
    const int64_t width = p.dim / p.groups;
    index = task % p.blocks();
    group = task / p.blocks() % p.groups;
    batch = task / p.blocks() / p.groups;
    channel = group * width + index * p.block;
    channels = width - index * p.block < p.block ? width - index * p.block : p.block;
  }
  int64_t vectors() const { return (channels + kLanes - 1) / kLanes; }
  int lanes(int64_t vector) const {
    return int(channels - vector * kLanes < kLanes ? channels - vector * kLanes : kLanes);
  }
};

inline int64_t vectors(const Scan& p) { return (p.block + kLanes - 1) / kLanes; }

// Part of a sequence, without an inner multiple of the segments' length; empty for an empty sequence.
struct Segment {
  int64_t sequence, begin, end;
  bool first, last;  // of its sequence
};

// f(segment) over the batch element's sequences in order, or backwards.
template <bool kBackwards, class F>
void for_segments(const Scan& p, int64_t batch, int64_t length, F f) {
  const int64_t sequences = p.cu_seqlens ? p.sequences : 1;
  for (int64_t i = 0; i < sequences; ++i) {
    const int64_t s = kBackwards ? sequences - 1 - i : i;
    const int64_t begin = p.cu_seqlens ? p.cu_seqlens[s] : 0, end = p.cu_seqlens ? p.cu_seqlens[s + 1] : p.steps;
    const int64_t first = begin / length, count = end > begin ? (end - 1) / length + 1 - first : 1;
    for (int64_t j = 0; j < count; ++j) {
      const int64_t k = first + (kBackwards ? count - 1 - j : j);
      f(Segment{p.cu_seqlens ? s : batch, k == first ? begin : k * length,
                k == first + count - 1 ? end : (k + 1) * length, k == first, k == first + count - 1});
    }
  }
}

// delta = softplus(delta + bias), as the flags say, in place; returns the largest |delta|.
inline vfloat finish_delta(const Scan& p, float* delta, const float* bias, int64_t count) {
  const vfloat b = load(bias, Full{});
  vfloat largest{};
  for (int64_t t = 0; t < count * kLanes; t += kLanes) {
    vfloat d = load(delta + t, Full{}) + b;
    if (p.delta_softplus) d = softplus(d);
    store(delta + t, d, Full{});
    largest = vselect(largest < absolute(d), absolute(d), largest);
  }
  return largest;
}

// A parameter (dim) of the block's channels, or zero: Lanes with one row per vector.
inline void load_channels(const float* p, const Block& b, float* out) {
  for (int64_t q = 0; q < b.vectors(); ++q)
    if (p)
      load_lanes(p + b.channel + q * kLanes, 1, 0, b.lanes(q), 1, out + q * kLanes);
    else
      store(out + q * kLanes, vfloat{}, Full{});
}

}  // namespace
}  // namespace DLOPS_ISA
}  // namespace dlops
