// What the scans share: kLanes channels side by side in vectors. `Lanes` arrays are (steps or states, kLanes). S is a
// state: a vfloat, or a Complex whose two parts lie `part` floats apart.
#pragma once

#include "core/math.h"
#include "core/shuffle.h"
#include "cpu/scan.h"

namespace dlops {
inline namespace DLOPS_ISA {
namespace {

#define DLOPS_INLINE __attribute__((always_inline))

struct Complex {
  vfloat re, im;
};

DLOPS_HD Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
DLOPS_HD Complex operator*(Complex a, Complex b) { return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re}; }
DLOPS_HD Complex operator*(Complex a, vfloat b) { return {a.re * b, a.im * b}; }
DLOPS_HD Complex conjugate(Complex a) { return {a.re, -a.im}; }
DLOPS_HD vfloat conjugate(vfloat a) { return a; }
DLOPS_HD vfloat real_part(Complex a) { return a.re; }
DLOPS_HD vfloat real_part(vfloat a) { return a; }

template <class S>
constexpr bool kIsComplex = false;
template <>
inline constexpr bool kIsComplex<Complex> = true;
template <class S>
constexpr int kParts = kIsComplex<S> ? 2 : 1;

template <class S>
DLOPS_HD S load_state(const float* p, int64_t part) {
  if constexpr (kIsComplex<S>)
    return {load(p, Full{}), load(p + part, Full{})};
  else
    return load(p, Full{});
}

DLOPS_HD void store_state(float* p, int64_t, vfloat s) { store(p, s, Full{}); }

DLOPS_HD void store_state(float* p, int64_t part, Complex s) {
  store(p, s.re, Full{});
  store(p + part, s.im, Full{});
}

// ---- staging -------------------------------------------------------------------------------------------------------

// out[row][lane] of a strided source, `out_stride` floats per row; lanes that do not exist are zero.
template <class T>
void load_lanes(const T* p, int64_t lane_stride, int64_t row_stride, int lanes, int64_t rows, float* out,
                int64_t out_stride = kLanes) {
  if (lane_stride == 1 && lanes == kLanes) {
    for (int64_t row = 0; row < rows; ++row) store(out + row * out_stride, load(p + row * row_stride, Full{}), Full{});
  } else if (row_stride == 1 && lanes == kLanes) {
    for_lanes(rows, [&](int64_t row, auto part) DLOPS_INLINE {
      vfloat v[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) v[lane] = load(p + lane * lane_stride + row, part);
      transpose(v);
      const int64_t count = rows - row < kLanes ? rows - row : kLanes;
      for (int64_t i = 0; i < count; ++i) store(out + (row + i) * out_stride, v[i], Full{});
    });
  } else {
    for (int64_t row = 0; row < rows; ++row) {
      float* to = out + row * out_stride;
      for (int lane = 0; lane < lanes; ++lane) to[lane] = to_float(p[lane * lane_stride + row * row_stride]);
      for (int lane = lanes; lane < kLanes; ++lane) to[lane] = 0;
    }
  }
}

template <class T>
void store_lanes(T* p, int64_t lane_stride, int64_t row_stride, int lanes, int64_t rows, const float* in,
                 int64_t in_stride = kLanes) {
  if (lane_stride == 1 && lanes == kLanes) {
    for (int64_t row = 0; row < rows; ++row) store(p + row * row_stride, load(in + row * in_stride, Full{}), Full{});
  } else if (row_stride == 1 && lanes == kLanes) {
    for_lanes(rows, [&](int64_t row, auto part) DLOPS_INLINE {
      vfloat v[kLanes]{};
      const int64_t count = rows - row < kLanes ? rows - row : kLanes;
      for (int64_t i = 0; i < count; ++i) v[i] = load(in + (row + i) * in_stride, Full{});
      transpose(v);
      for (int lane = 0; lane < kLanes; ++lane) store(p + lane * lane_stride + row, v[lane], part);
    });
  } else {
    for (int64_t row = 0; row < rows; ++row)
      for (int lane = 0; lane < lanes; ++lane)
        p[lane * lane_stride + row * row_stride] = from_float<T>(in[row * in_stride + lane]);
  }
}

// Hands out parts of a task's scratch memory.
struct Scratch {
  float* next;
  float* take(int64_t floats) {
    float* taken = next;
    next += floats;
    return taken;
  }
};

template <class T>
const T* at(const ScanTensor& x, int64_t batch, int64_t channel, int64_t step) {
  return static_cast<const T*>(x.data) + batch * x.batch + channel * x.channel + step * x.step;
}

template <class T>
T* at(const ScanOutput& x, int64_t batch, int64_t channel, int64_t step) {
  return static_cast<T*>(x.data) + batch * x.batch + channel * x.channel + step * x.step;
}

// kLanes channels of `count` steps, from `begin` on, to (steps, parts, kLanes).
template <class S, class T>
void load_steps(const ScanTensor& x, int64_t batch, int64_t channel, int64_t begin, int lanes, int64_t count,
                float* out) {
  if constexpr (kIsComplex<S>) {
    const float* p = static_cast<const float*>(x.data) + 2 * (batch * x.batch + channel * x.channel + begin * x.step);
    if (x.step == 1) {  // the parts are rows in turn
      load_lanes(p, 2 * x.channel, 1, lanes, 2 * count, out);
    } else if (x.channel == 1 && lanes == kLanes) {
      for (int64_t t = 0; t < count; ++t, p += 2 * x.step, out += 2 * kLanes) {
        const vfloat low = load(p, Full{}), high = load(p + kLanes, Full{});
        store_state(out, kLanes, Complex{every_second<false>(low, high), every_second<true>(low, high)});
      }
    } else {
      for (int part = 0; part < 2; ++part)
        load_lanes(p + part, 2 * x.channel, 2 * x.step, lanes, count, out + part * kLanes, 2 * kLanes);
    }
  } else {
    load_lanes(at<T>(x, batch, channel, begin), x.channel, x.step, lanes, count, out);
  }
}

template <class S, class T>
void store_steps(const ScanOutput& x, int64_t batch, int64_t channel, int64_t begin, int lanes, int64_t count,
                 const float* in) {
  if constexpr (kIsComplex<S>) {
    float* p = static_cast<float*>(x.data) + 2 * (batch * x.batch + channel * x.channel + begin * x.step);
    if (x.step == 1) {
      store_lanes(p, 2 * x.channel, 1, lanes, 2 * count, in);
    } else if (x.channel == 1 && lanes == kLanes) {
      for (int64_t t = 0; t < count; ++t, p += 2 * x.step, in += 2 * kLanes) {
        const Complex s = load_state<Complex>(in, kLanes);
        store(p, in_turn<false>(s.re, s.im), Full{});
        store(p + kLanes, in_turn<true>(s.re, s.im), Full{});
      }
    } else {
      for (int part = 0; part < 2; ++part)
        store_lanes(p + part, 2 * x.channel, 2 * x.step, lanes, count, in + part * kLanes, 2 * kLanes);
    }
  } else {
    store_lanes(at<T>(x, batch, channel, begin), x.channel, x.step, lanes, count, in);
  }
}

// One state per channel, contiguous from `channel` on; a null source is zero.
template <class S>
void load_vector(const float* p, int64_t channel, int lanes, float* out) {
  if (p)
    load_steps<S, float>({p, 0, 1, 0}, 0, channel, 0, lanes, 1, out);
  else
    store_state(out, kLanes, S{});
}

template <class S>
void store_vector(const float* in, int64_t channel, int lanes, float* p) {
  store_steps<S, float>({p, 0, 1, 0}, 0, channel, 0, lanes, 1, in);
}

}  // namespace
}  // namespace DLOPS_ISA
}  // namespace dlops
