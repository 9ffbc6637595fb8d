// Element types as kernels see them: storage types, exact conversions to and from float (round to nearest even).
#pragma once

#include <cstdint>

#include "core/macros.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace dlops {

enum class Dtype : int32_t { kFloat32, kBFloat16, kFloat16 };

inline namespace DLOPS_ISA {

struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  uint16_t bits;
};

DLOPS_HD uint32_t float_bits(float x) { return __builtin_bit_cast(uint32_t, x); }
DLOPS_HD float bits_float(uint32_t x) { return __builtin_bit_cast(float, x); }

DLOPS_HD float to_float(float x) { return x; }

DLOPS_HD float to_float(bfloat16 x) { return bits_float(uint32_t(x.bits) << 16); }

DLOPS_HD float to_float(float16 x) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(x.bits));
#else
  // Shift exponent and mantissa into place; the product rebiases the exponent and normalises subnormals exactly.
  const float value = bits_float(uint32_t(x.bits & 0x7fff) << 13) * 0x1p112f;
  const uint32_t special = (x.bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;  // inf and NaN keep an all-ones exponent
  return bits_float(float_bits(value) | special | uint32_t(x.bits & 0x8000) << 16);
#endif
}

template <class T>
DLOPS_HD T from_float(float x);

template <>
DLOPS_HD float from_float<float>(float x) {
  return x;
}

template <>
DLOPS_HD bfloat16 from_float<bfloat16>(float x) {
#if defined(__CUDA_ARCH__)
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#else
  const uint32_t bits = float_bits(x);
  return {uint16_t(x != x ? 0x7fc0u : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
#endif
}

template <>
DLOPS_HD float16 from_float<float16>(float x) {
#if defined(__CUDA_ARCH__)
  return {__half_as_ushort(__float2half_rn(x))};
#else
  const uint32_t sign = float_bits(x) >> 16 & 0x8000;
  const uint32_t magnitude = float_bits(x) & 0x7fffffff;
  // Subnormal halves: adding 0.5 aligns the last half bit with the last float bit, so that the addition rounds.
  const uint32_t small = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13;
  const uint32_t finite = magnitude < 0x38800000u ? small : normal;
  const uint32_t overflow = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return {uint16_t(sign | (magnitude >= 0x477ff000u ? overflow : finite))};
#endif
}

// Two halves as one word, the first in its low bits.
template <class T>
DLOPS_HD uint32_t halves_from_floats(float low, float high) {
  return from_float<T>(low).bits | uint32_t(from_float<T>(high).bits) << 16;
}

#if defined(__CUDA_ARCH__)  // one instruction each
template <>
DLOPS_HD uint32_t halves_from_floats<bfloat16>(float low, float high) {
  const __nv_bfloat162_raw pair = __floats2bfloat162_rn(low, high);
  return pair.x | uint32_t(pair.y) << 16;
}

template <>
DLOPS_HD uint32_t halves_from_floats<float16>(float low, float high) {
  const __half2_raw pair = __floats2half2_rn(low, high);
  return pair.x | uint32_t(pair.y) << 16;
}
#endif

}  // namespace DLOPS_ISA
}  // namespace dlops
