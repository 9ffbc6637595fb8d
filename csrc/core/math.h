// Elementary functions on F = float and, on the host, simd.h's vfloat. No libm call and no
// branch, so that every loop over them vectorises. Largest error found against float64 with fused multiply-add, in
// units of the last place: exp and expm1_negative 1.0, exp2 0.9, sigmoid 2.4, softplus 2.6, tanh 2.2;
// cos_sin_turns 0.7 eps.
#pragma once

#if defined(__CUDACC__) || defined(DLOPS_SIMT)
#include "core/dtype.h"
#else
#include "core/simd.h"
#endif

namespace dlops {
inline namespace DLOPS_ISA {

DLOPS_HD float vselect(bool mask, float a, float b) { return mask ? a : b; }
DLOPS_HD int32_t float_as_int(float x) { return __builtin_bit_cast(int32_t, x); }
DLOPS_HD float int_as_float(int32_t x, float) { return __builtin_bit_cast(float, x); }

template <class F>
DLOPS_HD F splat(float x) {
  return x - F{};
}

template <class F>
DLOPS_HD F maximum(F x, float low) {  // NaN stays NaN
  return vselect(x < low, splat<F>(low), x);
}

template <class F>
DLOPS_HD F minimum(F x, float high) {
  return vselect(x > high, splat<F>(high), x);
}

template <class F>
DLOPS_HD F absolute(F x) {
  return int_as_float(float_as_int(x) & 0x7fffffff, x);
}

// exp(x) = 2^n (1 + q): n an integer, q = expm1 of the remainder. |x| < 2^22 ln 2.
template <class F>
struct ExpParts {
  decltype(float_as_int(F{})) n;
  F q;
};

template <class F>
DLOPS_HD ExpParts<F> exp_parts(F x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const F shifted = x * 1.44269504f + kRound;
  const F n = shifted - kRound;
  const F r = x - n * 0.693359375f + n * 2.12194440e-4f;
  F p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return {float_as_int(shifted) - float_as_int(kRound), p * (r * r) + r};
}

template <class I, class F>
DLOPS_HD F exp2_int(I n, F type) {  // -126 <= n <= 127
  return int_as_float((n + 127) << 23, type);
}

template <class F>
DLOPS_HD F exp(F x) {
  const ExpParts<F> e = exp_parts(minimum(maximum(x, -104.0f), 89.0f));
  const auto half = e.n >> 1;  // in two steps: 2^n itself may be subnormal or infinite
  return (e.q + 1.0f) * exp2_int(half, x) * exp2_int(e.n - half, x);
}

// 2^x of kCount vectors x = scale (rate + low), rounded once; a step of each at a time: their chains of operations fill
// each other's waits. 2^x is 2^n (1 + f q(f)), n the nearest integer: close to x = 0, where products of many are taken,
// there is no error but that of the last rounding. kNear: |scale rate| <= 126 is known.
template <bool kNear, int kCount, class F>
DLOPS_HD void exp2(F scale, const F (&rate)[kCount], const F (&low)[kCount], F (&out)[kCount]) {
  // 1.5 * 2^23 plus the exponents' bias, twice without kNear: adding it leaves n + bias in the low bits.
  constexpr float kRound = 12582912.0f + (kNear ? 127 : 254);
  constexpr float kFactors[] = {1.3391025e-3f, 9.618519e-3f, 5.5503596e-2f, 2.4022648e-1f, 6.93147182e-1f, 1.0f};
  F shifted[kCount], f[kCount];
  if constexpr (kNear) {
    for (int i = 0; i < kCount; ++i) shifted[i] = scale * rate[i] + kRound;
    for (int i = 0; i < kCount; ++i) f[i] = scale * rate[i] - (shifted[i] - kRound);
    for (int i = 0; i < kCount; ++i) f[i] = scale * low[i] + f[i];
  } else {
    const F finite = minimum(maximum(scale, -3e38f), 3e38f);
    for (int i = 0; i < kCount; ++i) {
      shifted[i] = minimum(maximum(scale * rate[i], -151.0f), 129.0f) + kRound;
      f[i] = minimum(maximum(scale * rate[i] - (shifted[i] - kRound), -1.0f), 1.0f);
      f[i] = minimum(maximum(finite * low[i] + f[i], -0.51f), 0.51f);
    }
  }
  for (int i = 0; i < kCount; ++i) out[i] = f[i] * 1.5324209e-4f + kFactors[0];
  for (int k = 1; k < 6; ++k)
    for (int i = 0; i < kCount; ++i) out[i] = out[i] * f[i] + kFactors[k];
  for (int i = 0; i < kCount; ++i) {
    const auto sum = float_as_int(shifted[i]);
    if constexpr (kNear) {
      out[i] = out[i] * int_as_float(sum << 23, scale);
    } else {  // in two factors: 2^n itself may be subnormal or infinite
      const auto half = sum >> 1;
      out[i] = out[i] * int_as_float(half << 23, scale) * int_as_float((sum - half) << 23, scale);
    }
  }
}

// The cosine and sine of an angle given in turns, turns + low; finite for every finite angle.
template <class F>
struct CosSin {
  F cos, sin;
};

template <class F>
DLOPS_HD CosSin<F> cos_sin_turns(F turns, F low) {
  constexpr float kRound = 12582912.0f;
  const F part = turns - ((turns + kRound) - kRound);  // of a turn
  const F shifted = (part + low) * 4.0f + kRound;      // the nearest quarter turn in the low bits
  const F r = minimum(maximum(part - (shifted - kRound) * 0.25f + low, -0.1251f), 0.1251f);
  const F r2 = r * r;
  F s = r2 * -75.3935623f + 81.5923538f;
  s = s * r2 - 41.3416634f;
  s = (s * r2 - 1.74845553e-7f) * r + r * 6.28318548f;  // 2 pi in two parts
  F c = r2 * 59.4217072f - 85.4487610f;
  c = c * r2 + 64.9393692f;
  c = c * r2 - 19.7392082f;
  c = c * r2 + 1.0f;
  const auto quarter = float_as_int(shifted);
  const auto odd = (quarter & 1) != 0;
  const F cosine = vselect(odd, s, c), sine = vselect(odd, c, s);
  const auto sign = (quarter & 2) << 30, cosine_sign = ((quarter + 1) & 2) << 30;
  return {int_as_float(float_as_int(cosine) ^ cosine_sign, r), int_as_float(float_as_int(sine) ^ sign, r)};
}

template <class F>
DLOPS_HD F expm1_negative(F x) {  // exp(x) - 1 for x <= 0; 0 for x > 0
  const ExpParts<F> e = exp_parts(minimum(maximum(x, -18.0f), 0.0f));
  const F scale = exp2_int(e.n, x);
  return scale * e.q + (scale - 1.0f);
}

template <class F>
DLOPS_HD F sigmoid(F x) {
  return 1.0f / (exp(-x) + 1.0f);
}

template <class F>
DLOPS_HD F tanh(F x) {
  const F a = absolute(x);
  const ExpParts<F> e = exp_parts(maximum(a * -2.0f, -36.0f));
  const F scale = exp2_int(e.n, x);
  const F w = scale * e.q + scale;  // exp(-2 a)
  // (1 - w) / (1 + w) keeps its relative error for small a, 1 - 2 w / (1 + w) that of 1 - tanh for large a.
  const auto large = a > 0.55f;
  const F quotient = vselect(large, w * 2.0f, (1.0f - scale) - scale * e.q) / (w + 1.0f);
  const F t = vselect(large, 1.0f - quotient, quotient);
  return vselect(x < 0, -t, t);
}

template <class F>
DLOPS_HD F log1p_unit(F x) {  // log(1 + x) for 0 <= x <= 1, as 2 atanh(x / (2 + x))
  const F s = x / (x + 2.0f);
  const F z = s * s;
  F p = z * 0.28178185f + 0.27960637f;
  p = p * z + 0.40024906f;
  p = p * z + 0.66666316f;
  return (p * z) * s + s * 2.0f;
}

template <class F>
DLOPS_HD F softplus(F x) {  // log(1 + exp(x))
  return maximum(x, 0.0f) + log1p_unit(exp(-absolute(x)));
}

// The standard normal distribution function, without a division: 2 to a polynomial fitted to log2(cdf(-|x|)) on
// [0, 6], relative error 1e-7 near 0 growing to 1e-6 at 6, and its limits beyond.
template <class F>
DLOPS_HD F normal_cdf(F x) {
  const F magnitude = absolute(x);
  const F a = minimum(magnitude, 6.0f), a2 = a * a, a4 = a2 * a2;
  const F p12 = a * -0.45918167f - 1.1511084f, p34 = a * 0.0071255205f - 0.052562624f;
  const F p56 = a * -0.00021123941f - 0.00014424147f, p78 = a * -7.674981e-6f + 5.6928748e-5f;
  const F p90 = a * -1.7263912e-8f + 5.5716237e-7f;
  const F log2_cdf = ((p34 * a2 + p12) + (p90 * a4 + (p78 * a2 + p56)) * a4) * a - 1.0f;
  constexpr float kRound = 12582912.0f;
  const F shifted = log2_cdf + kRound;
  const F f = log2_cdf - (shifted - kRound), f2 = f * f;
  const F q01 = f * 0.693147f + 1.0f, q23 = f * 0.055507336f + 0.24022242f, q45 = f * 0.0013264725f + 0.009671513f;
  const F power = (q45 * f2 + q23) * f2 + q01;  // 2^f
  const F tail = int_as_float(float_as_int(power) + (float_as_int(shifted) << 23), x);
  return vselect(x > 0, 1.0f - tail, vselect(x < -6, splat<F>(0), tail));
}

// The standard normal distribution function and exp(-x^2 / 2), of which its density is a multiple. Both are taken to
// have reached their limits beyond |x| = 13.
template <class F>
struct Normal {
  F cdf, bell;
};

template <class F>
DLOPS_HD Normal<F> normal(F x) {
  const F magnitude = absolute(x);
  const F a = minimum(magnitude, 13.0f);
  const ExpParts<F> e = exp_parts(a * a * -0.5f);
  const F scale = vselect(magnitude > 13, splat<F>(0), exp2_int(e.n, x));
  const F bell = scale * e.q + scale;
  // cdf(-a) / bell as a polynomial in w = 1 / (1 + 0.27 a), fitted on [0, 14.6]; relative error 3e-8
  const F w = 1.0f / (a * 0.27f + 1.0f);
  const F w2 = w * w, w4 = w2 * w2;  // in pairs: shorter chains of dependent operations
  const F p01 = w * 0.10754190f + 0.10772072f, p23 = w * 0.07202594f + 0.10181706f;
  const F p45 = 0.10787787f - w * 0.069281965f, p67 = 0.16984487f - w * 0.12651268f;
  const F p = (p23 * w2 + p01) + ((w4 * 0.028966313f + (p67 * w2 + p45)) * w4);
  const F tail = bell * (p * w);
  return {vselect(x > 0, 1.0f - tail, tail), bell};
}

}  // namespace DLOPS_ISA
}  // namespace dlops
