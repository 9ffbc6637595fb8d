// Device functions that the host's headers do not have. Approximate ones are as exact here as their exact forms.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

// Rounded once, and never contracted into a fused multiply-add.
float __fmul_rn(float a, float b);
float __fadd_rn(float a, float b);
float __fsub_rn(float a, float b);
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __frsqrt_rn(float x) { return float(1 / std::sqrt(double(x))); }

inline float rsqrtf(float x) { return __frsqrt_rn(x); }
inline float rcbrtf(float x) { return 1 / std::cbrt(x); }
inline float normcdff(float x) { return float(0.5 * std::erfc(-double(x) * 0.70710678118654752)); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return std::exp(x); }
inline float __exp10f(float x) { return float(std::pow(10.0, double(x))); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __log10f(float x) { return std::log10(x); }
inline float __powf(float x, float y) { return std::pow(x, y); }
inline float __sinf(float x) { return std::sin(x); }
inline float __cosf(float x) { return std::cos(x); }
inline float __tanf(float x) { return std::tan(x); }
inline float __saturatef(float x) { return x > 0 ? std::min(x, 1.0f) : 0.0f; }  // NaN becomes 0

inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
int __float2int_rz(float x);
inline int __float2int_rn(float x) { return __float2int_rz(std::nearbyint(x)); }
inline int __float2int_rd(float x) { return __float2int_rz(std::floor(x)); }
inline int __float2int_ru(float x) { return __float2int_rz(std::ceil(x)); }
inline float __int2float_rn(int x) { return float(x); }

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(unsigned(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return x ? std::countr_zero(unsigned(x)) + 1 : 0; }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline int __mulhi(int a, int b) { return int(int64_t(a) * b >> 32); }
unsigned __brev(unsigned x);
unsigned __byte_perm(unsigned a, unsigned b, unsigned selector);

#define DLOPS_SIMT_MIN_MAX(type)                            \
  inline type min(type a, type b) { return b < a ? b : a; } \
  inline type max(type a, type b) { return a < b ? b : a; }
DLOPS_SIMT_MIN_MAX(int)
DLOPS_SIMT_MIN_MAX(unsigned)
DLOPS_SIMT_MIN_MAX(long)
DLOPS_SIMT_MIN_MAX(unsigned long)
DLOPS_SIMT_MIN_MAX(long long)
DLOPS_SIMT_MIN_MAX(unsigned long long)
#undef DLOPS_SIMT_MIN_MAX
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }

// Loads and stores with a hint to the caches.
template <class T>
inline __attribute__((always_inline)) T __ldg(const T* p) {
  return *p;
}
template <class T>
inline __attribute__((always_inline)) T __ldcg(const T* p) {
  return *p;
}
template <class T>
inline __attribute__((always_inline)) T __ldcs(const T* p) {
  return *p;
}
template <class T>
inline __attribute__((always_inline)) void __stcg(T* p, T value) {
  *p = value;
}
template <class T>
inline __attribute__((always_inline)) void __stcs(T* p, T value) {
  *p = value;
}
