// Linear recurrence on the host. A task is a block of channels of one batch element; it goes through time in segments,
// each vector of channels staged as Lanes: one pass over memory.
#include "cpu/linear_scan.h"

#include "cpu/lanes.h"

namespace dlops {
inline namespace DLOPS_ISA {
namespace {

constexpr int64_t kSteps = 32;  // that are staged at once

int64_t linear_scan_scratch(const LinearScan& p) { return 2 * (3 * kSteps + 2 * (p.block / kLanes)) * kLanes; }

struct Channels {
  int64_t batch, channel, vectors, count;
  Channels(const LinearScan& p, int64_t task) {
    const int64_t blocks = (p.dim + p.block - 1) / p.block;
    batch = task / blocks;
    channel = task % blocks * p.block;
    count = p.dim - channel < p.block ? p.dim - channel : p.block;
    vectors = (count + kLanes - 1) / kLanes;
  }
  int lanes(int64_t q) const { return int(count - q * kLanes < kLanes ? count - q * kLanes : kLanes); }
};

// f(begin, end) over the segments of all steps, in their order or backwards.
template <class F>
DLOPS_HD void for_steps(int64_t steps, bool backwards, F f) {
  const int64_t count = (steps + kSteps - 1) / kSteps;
  for (int64_t j = 0; j < count; ++j) {
    const int64_t begin = (backwards ? count - 1 - j : j) * kSteps;
    f(begin, steps - begin < kSteps ? steps : begin + kSteps);
  }
}

template <class T, class S>
void forward_task(const LinearScanForward& p, int64_t task, Scratch scratch) {
  constexpr int64_t kRow = kParts<S> * kLanes;
  const Channels c(p, task);
  float* state = scratch.take(c.vectors * kRow);
  float* a = scratch.take(kSteps * kRow);
  float* h = scratch.take(kSteps * kRow);
  for (int64_t q = 0; q < c.vectors; ++q)
    load_vector<S>(p.initial_state, c.batch * p.dim + c.channel + q * kLanes, c.lanes(q), state + q * kRow);
  for_steps(p.steps, p.reverse, [&](int64_t begin, int64_t end) DLOPS_INLINE {
    const int64_t count = end - begin, first = p.reverse ? count - 1 : 0, next = p.reverse ? -kRow : kRow;
    for (int64_t q = 0; q < c.vectors; ++q) {
      const int64_t channel = c.channel + q * kLanes;
      load_steps<S, T>(p.a, c.batch, channel, begin, c.lanes(q), count, a);
      load_steps<S, T>(p.b, c.batch, channel, begin, c.lanes(q), count, h);
      S s = load_state<S>(state + q * kRow, kLanes);
      int64_t at = first * kRow;
      for (int64_t t = 0; t < count; ++t, at += next) {
        s = load_state<S>(a + at, kLanes) * s + load_state<S>(h + at, kLanes);
        store_state(h + at, kLanes, s);
      }
      store_state(state + q * kRow, kLanes, s);
      store_steps<S, T>(p.h, c.batch, channel, begin, c.lanes(q), count, h);
    }
  });
}

// g[t] = dh[t] + conj(a[t+1]) g[t+1] is the gradient of b[t], and g[t] conj(h[t-1]) that of a[t]; `carry` is conj(a[t])
// g[t]. Time is that of the recurrence, whose last step comes first here.
template <class T, class S>
void backward_task(const LinearScanBackward& p, int64_t task, Scratch scratch) {
  constexpr int64_t kRow = kParts<S> * kLanes;
  const Channels c(p, task);
  float* initial = scratch.take(c.vectors * kRow);
  float* carries = scratch.take(c.vectors * kRow);
  float* a = scratch.take(kSteps * kRow);
  float* g = scratch.take(kSteps * kRow);
  float* h = scratch.take(kSteps * kRow);
  const int64_t state = c.batch * p.dim + c.channel;
  for (int64_t q = 0; q < c.vectors; ++q) {
    load_vector<S>(p.initial_state, state + q * kLanes, c.lanes(q), initial + q * kRow);
    store_state(carries + q * kRow, kLanes, S{});
  }
  for_steps(p.steps, !p.reverse, [&](int64_t begin, int64_t end) DLOPS_INLINE {
    const int64_t count = end - begin, last = p.reverse ? 0 : count - 1, next = p.reverse ? kRow : -kRow;
    const bool starts = p.reverse ? end == p.steps : begin == 0;  // the recurrence's first step is here
    for (int64_t q = 0; q < c.vectors; ++q) {
      const int64_t channel = c.channel + q * kLanes;
      const int lanes = c.lanes(q);
      load_steps<S, T>(p.a, c.batch, channel, begin, lanes, count, a);
      load_steps<S, T>(p.dh, c.batch, channel, begin, lanes, count, g);
      // At each step's row the state before it.
      const int64_t initial_rows = starts && !p.reverse;
      load_steps<S, T>(p.h, c.batch, channel, begin + (p.reverse ? 1 : -1) + initial_rows, lanes, count - starts,
                       h + initial_rows * kRow);
      if (starts)
        store_state(h + (p.reverse ? count - 1 : 0) * kRow, kLanes, load_state<S>(initial + q * kRow, kLanes));
      S carry = load_state<S>(carries + q * kRow, kLanes);
      int64_t at = last * kRow;
      for (int64_t t = 0; t < count; ++t, at += next) {
        const S gradient = load_state<S>(g + at, kLanes) + carry;
        carry = conjugate(load_state<S>(a + at, kLanes)) * gradient;
        store_state(g + at, kLanes, gradient);
        store_state(a + at, kLanes, conjugate(load_state<S>(h + at, kLanes)) * gradient);
      }
      store_state(carries + q * kRow, kLanes, carry);
      if (p.da.data) store_steps<S, T>(p.da, c.batch, channel, begin, lanes, count, a);
      if (p.db.data) store_steps<S, T>(p.db, c.batch, channel, begin, lanes, count, g);
    }
  });
  if (p.dinitial_state)
    for (int64_t q = 0; q < c.vectors; ++q)
      store_vector<S>(carries + q * kRow, state + q * kLanes, c.lanes(q), p.dinitial_state);
}

void forward(const LinearScanForward& p, int64_t begin, int64_t end, float* scratch) {
  for (int64_t task = begin; task < end; ++task) {
    if (p.complex)
      forward_task<float, Complex>(p, task, {scratch});
    else if (p.dtype == Dtype::kFloat32)
      forward_task<float, vfloat>(p, task, {scratch});
    else if (p.dtype == Dtype::kBFloat16)
      forward_task<bfloat16, vfloat>(p, task, {scratch});
    else
      forward_task<float16, vfloat>(p, task, {scratch});
  }
}

void backward(const LinearScanBackward& p, int64_t begin, int64_t end, float* scratch) {
  for (int64_t task = begin; task < end; ++task) {
    if (p.complex)
      backward_task<float, Complex>(p, task, {scratch});
    else if (p.dtype == Dtype::kFloat32)
      backward_task<float, vfloat>(p, task, {scratch});
    else if (p.dtype == Dtype::kBFloat16)
      backward_task<bfloat16, vfloat>(p, task, {scratch});
    else
      backward_task<float16, vfloat>(p, task, {scratch});
  }
}

}  // namespace

const LinearScanKernels linear_scan_kernels = {kLanes, linear_scan_scratch, forward, backward};

}  // namespace DLOPS_ISA
}  // namespace dlops
