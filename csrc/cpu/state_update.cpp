// Decoding steps on the host. What is one number per channel is computed for kLanes channels at once, the scan's states
// of each channel by themselves.
#include "cpu/state_update.h"

#include "cpu/lanes.h"

namespace dlops {
inline namespace DLOPS_ISA {
namespace {

template <class T>
vfloat load_channels(const T* p, int64_t stride, int lanes) {
  alignas(64) float v[kLanes];
  load_lanes(p, stride, 0, lanes, 1, v);
  return load(v, Full{});
}

// One group's B or C in float, with zeros up to a whole vector.
template <class T>
void stage(const Strided<const void*>& x, int64_t batch, int64_t group, int64_t states, float* out) {
  const T* p = at<const T>(x, batch, group, 0);
  for_lanes(states, [&](int64_t n, auto part) DLOPS_INLINE {
    if (x.stride[2] == 1) return store(out + n, load(p + n, part), Full{});
    for (int64_t i = n; i < n + kLanes; ++i) out[i] = i < states ? to_float(p[i * x.stride[2]]) : 0;
  });
}

// The states of one channel go on by a step; returns C . state, of the states before they are rounded.
template <class H, bool kSameA>
float advance(const float* A, H* state, float step, float input, const float* B, const float* C, int64_t states) {
  const vfloat same = kSameA ? exp(splat<vfloat>(step * A[0])) : vfloat{};
  vfloat sum{};
  for_lanes(states, [&](int64_t n, auto part) DLOPS_INLINE {
    const vfloat decay = kSameA ? same : exp(step * load(A + n, part));
    const vfloat h = decay * load(state + n, part) + input * load(B + n, Full{});
    store(state + n, h, part);
    sum += keep(h * load(C + n, Full{}), part);
  });
  return horizontal_sum(sum);
}

// The same of states that are `stride` apart.
template <class H, bool kSameA>
float advance_apart(const float* A, H* state, int64_t stride, float step, float input, const float* B, const float* C,
                    int64_t states) {
  H adjacent[kUpdateStates];
  for (int64_t n = 0; n < states; ++n) adjacent[n] = state[n * stride];
  const float sum = advance<H, kSameA>(A, adjacent, step, input, B, C, states);
  for (int64_t n = 0; n < states; ++n) state[n * stride] = adjacent[n];
  return sum;
}

// Whether a batch element has an entry of the state; y of one that has none is 0.
bool has_entry(int64_t entry, int64_t entries) { return entry >= 0 && entry < entries; }

template <class T>
void zero(const Strided<void*>& y, int64_t i, int64_t j, int64_t first, int64_t last) {
  for (int64_t k = first; k < last; ++k) *at<T>(y, i, j, k) = from_float<T>(0);
}

template <class T, class H, bool kSameA>
void scan_task(const ScanUpdate& p, int64_t task) {
  const int64_t blocks = update_blocks(p.channels), first = task % blocks * kUpdateChannels;
  const int64_t head = task / blocks % p.heads, batch = task / blocks / p.heads;
  const int64_t entry = p.indices ? p.indices[batch] : batch;
  const int64_t last = first + kUpdateChannels < p.channels ? first + kUpdateChannels : p.channels;
  if (!has_entry(entry, p.entries)) return zero<T>(p.y, batch, head, first, last);
  alignas(64) float B[kUpdateStates], C[kUpdateStates];
  stage<T>(p.B, batch, head / (p.heads / p.groups), p.states, B);
  stage<T>(p.C, batch, head / (p.heads / p.groups), p.states, C);
  for (int64_t channel = first; channel < last; channel += kLanes) {
    const int lanes = last - channel < kLanes ? int(last - channel) : kLanes;
    const vfloat x = load_channels(at<const T>(p.x, batch, head, channel), p.x.stride[2], lanes);
    vfloat step = load_channels(at<const T>(p.dt, batch, head, channel), p.dt.stride[2], lanes);
    if (p.dt_bias.data) step += load_channels(at<const float>(p.dt_bias, 0, head, channel), p.dt_bias.stride[2], lanes);
    if (p.dt_softplus) step = softplus(step);
    const vfloat input = step * x;
    alignas(64) float sums[kLanes]{};
    for (int lane = 0; lane < lanes; ++lane) {
      const float* A = at<const float>(p.A, head, channel + lane, 0);
      H* state = at<H>(p.state, entry, head, channel + lane);
      if (p.state.stride[3] == 1)
        sums[lane] = advance<H, kSameA>(A, state, step[lane], input[lane], B, C, p.states);
      else
        sums[lane] = advance_apart<H, kSameA>(A, state, p.state.stride[3], step[lane], input[lane], B, C, p.states);
    }
    vfloat y = load(sums, Full{});
    if (p.D.data) y += load_channels(at<const float>(p.D, 0, head, channel), p.D.stride[2], lanes) * x;
    if (p.z.data) {
      const vfloat gate = load_channels(at<const T>(p.z, batch, head, channel), p.z.stride[2], lanes);
      y *= gate * sigmoid(gate);
    }
    store(sums, y, Full{});
    store_lanes(at<T>(p.y, batch, head, channel), p.y.stride[2], 0, lanes, 1, sums);
  }
}

float element(const void* p, Dtype dtype, int64_t i) {
  switch (dtype) {
    case Dtype::kBFloat16: return to_float(static_cast<const bfloat16*>(p)[i]);
    case Dtype::kFloat16: return to_float(static_cast<const float16*>(p)[i]);
    default: return static_cast<const float*>(p)[i];
  }
}

template <class T, class W>
void conv_task(const ConvUpdate& p, int64_t task) {
  const int64_t blocks = update_blocks(p.channels), batch = task / blocks, first = task % blocks * kUpdateChannels;
  const int64_t entry = p.indices ? p.indices[batch] : batch;
  const int64_t count = first + kUpdateChannels < p.channels ? kUpdateChannels : p.channels - first;
  if (!has_entry(entry, p.entries)) {
    for (int64_t c = first; c < first + count; ++c) zero<T>(p.y, batch, c, 0, p.steps);
    return;
  }
  const int64_t length = p.state_len, oldest = p.seen && length ? (p.seen[batch] % length + length) % length : 0;
  const auto slot = [&](int64_t i) {  // where the i-th oldest step is, and the one that takes its place
    const int64_t place = oldest + i;
    return p.seen && place >= length ? place - length : place;
  };
  alignas(64) float sums[kUpdateChannels];
  for (int64_t t = 0; t < p.steps; ++t) {
    for (int64_t c = 0; c < count; ++c) sums[c] = p.bias ? element(p.bias, p.bias_dtype, first + c) : 0;
    for (int64_t tap = 0; tap < p.width; ++tap) {
      const int64_t seen = t - (p.width - 1 - tap) * p.dilation;
      const T* value =
          seen < 0 ? at<const T>(p.state, entry, first, slot(length + seen)) : at<const T>(p.x, batch, first, seen);
      const int64_t value_stride = seen < 0 ? p.state.stride[1] : p.x.stride[1], weight_stride = p.weight.stride[1];
      const W* weight = at<const W>(p.weight, 0, first, tap);
      for (int64_t c = 0; c < count; ++c)
        sums[c] += to_float(value[c * value_stride]) * to_float(weight[c * weight_stride]);
    }
    if (p.silu)
      for_lanes(count, [&](int64_t c, auto part) DLOPS_INLINE {
        const vfloat pre = load(sums + c, part);
        store(sums + c, pre * sigmoid(pre), part);
      });
    for (int64_t c = 0; c < count; ++c) *at<T>(p.y, batch, first + c, t) = from_float<T>(sums[c]);
  }
  for (int64_t c = 0; c < count; ++c) {
    const T* x = at<const T>(p.x, batch, first + c, 0);
    T* state = at<T>(p.state, entry, first + c, 0);
    const int64_t kept = p.steps < length ? length - p.steps : 0;
    if (!p.seen)
      for (int64_t i = 0; i < kept; ++i) state[i * p.state.stride[2]] = state[(i + p.steps) * p.state.stride[2]];
    for (int64_t i = kept; i < length; ++i) {
      const int64_t t = i - (length - p.steps);
      const int64_t place = p.seen ? (oldest + t) % length : i;
      state[place * p.state.stride[2]] = x[t * p.x.stride[2]];
    }
  }
}

template <class T, class H>
void scan_typed(const ScanUpdate& p, int64_t begin, int64_t end) {
  const bool same = p.A.stride[2] == 0 && p.states > 0;
  for (int64_t task = begin; task < end; ++task)
    same ? scan_task<T, H, true>(p, task) : scan_task<T, H, false>(p, task);
}

void selective_state_update(const ScanUpdate& p, int64_t begin, int64_t end) {
  const bool rounded = p.state_dtype != Dtype::kFloat32;
  switch (p.dtype) {
    case Dtype::kFloat32: return scan_typed<float, float>(p, begin, end);
    case Dtype::kBFloat16:
      return rounded ? scan_typed<bfloat16, bfloat16>(p, begin, end) : scan_typed<bfloat16, float>(p, begin, end);
    case Dtype::kFloat16:
      return rounded ? scan_typed<float16, float16>(p, begin, end) : scan_typed<float16, float>(p, begin, end);
  }
}

template <class T>
void conv_typed(const ConvUpdate& p, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task)
    p.weight_dtype == p.dtype ? conv_task<T, T>(p, task) : conv_task<T, float>(p, task);
}

void causal_conv1d_update(const ConvUpdate& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case Dtype::kFloat32: return conv_typed<float>(p, begin, end);
    case Dtype::kBFloat16: return conv_typed<bfloat16>(p, begin, end);
    case Dtype::kFloat16: return conv_typed<float16>(p, begin, end);
  }
}

}  // namespace

const StateUpdateKernels state_update_kernels = {selective_state_update, causal_conv1d_update};

}  // namespace DLOPS_ISA
}  // namespace dlops
