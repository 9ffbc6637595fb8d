// Vectors of kLanes floats (GCC/Clang vector extensions) with loads and stores of every element type.
// Only csrc/cpu includes this; the width follows the instruction set the file is compiled for.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/dtype.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dlops {
inline namespace DLOPS_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vfloat __attribute__((vector_size(kLanes * 4)));
typedef int32_t vint __attribute__((vector_size(kLanes * 4)));
typedef uint32_t vuint __attribute__((vector_size(kLanes * 4)));
typedef uint16_t vshort __attribute__((vector_size(kLanes * 2)));

DLOPS_HD vfloat vselect(vint mask, vfloat a, vfloat b) { return mask ? a : b; }
DLOPS_HD vuint vselect(vint mask, vuint a, vuint b) { return mask ? a : b; }

// One instruction each, which GCC does not make of a comparison and a selection. NaN stays NaN.
DLOPS_HD vfloat maximum(vfloat x, float low) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_maskz_max_ps(0xffff, (__m512)(low - vfloat{}), (__m512)x);
#elif defined(__AVX__)
  return (vfloat)_mm256_max_ps((__m256)(low - vfloat{}), (__m256)x);
#elif defined(__x86_64__)
  return (vfloat)_mm_max_ps((__m128)(low - vfloat{}), (__m128)x);
#else
  return vselect(x < low, low - vfloat{}, x);
#endif
}

DLOPS_HD vfloat minimum(vfloat x, float high) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_maskz_min_ps(0xffff, (__m512)(high - vfloat{}), (__m512)x);
#elif defined(__AVX__)
  return (vfloat)_mm256_min_ps((__m256)(high - vfloat{}), (__m256)x);
#elif defined(__x86_64__)
  return (vfloat)_mm_min_ps((__m128)(high - vfloat{}), (__m128)x);
#else
  return vselect(x > high, high - vfloat{}, x);
#endif
}

DLOPS_HD vint float_as_int(vfloat x) { return (vint)x; }
DLOPS_HD vfloat int_as_float(vint x, vfloat) { return (vfloat)x; }

DLOPS_HD bool all(vint mask) {
  int32_t every = -1;
  for (int i = 0; i < kLanes; ++i) every &= mask[i];
  return every != 0;
}

// Keeps the compiler from fusing the operation that made v with the one that uses it.
DLOPS_HD vfloat rounded(vfloat v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}

// How many elements of a vector exist: all of them, or the first `count` (the end of a row).
struct Full {};
struct Partial {
  int count;
};

template <class V>
DLOPS_HD V load_raw(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}

DLOPS_HD vfloat widen(vfloat v, const float*) { return v; }

DLOPS_HD vuint widen_bits(vshort v) {  // __builtin_convertvector, which GCC splits into halves
#if defined(__AVX512F__)
  return (vuint)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)v);
#elif defined(__AVX2__)
  return (vuint)_mm256_cvtepu16_epi32((__m128i)v);
#else
  return __builtin_convertvector(v, vuint);
#endif
}

DLOPS_HD vfloat widen(vshort v, const bfloat16*) { return (vfloat)(widen_bits(v) << 16); }

DLOPS_HD vfloat widen(vshort v, const float16*) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_maskz_cvtph_ps(0xffff, (__m256i)v);
#elif defined(__F16C__)
  return (vfloat)_mm256_cvtph_ps((__m128i)v);
#else
  const vuint bits = __builtin_convertvector(v, vuint);
  const vfloat value = (vfloat)((bits & 0x7fff) << 13) * 0x1p112f;
  const vuint special = (vuint)((bits & 0x7c00) == 0x7c00) & 0x7f800000u;
  return (vfloat)((vuint)value | special | (bits & 0x8000) << 16);
#endif
}

DLOPS_HD vfloat narrow(vfloat v, float*) { return v; }

DLOPS_HD vshort narrow(vfloat v, bfloat16*) {
  const vuint bits = (vuint)v;
  const vuint rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
  const vuint result = vselect((vint)(v != v), vuint{} + 0x7fc0u, rounded);
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m128i low = _mm256_castsi256_si128((__m256i)result), high = _mm256_extracti128_si256((__m256i)result, 1);
  return (vshort)_mm_packus_epi32(low, high);
#else
  return __builtin_convertvector(result, vshort);
#endif
}

DLOPS_HD vshort narrow(vfloat v, float16*) {
#if defined(__AVX512F__)
  return (vshort)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
  return (vshort)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const vuint sign = (vuint)v >> 16 & 0x8000;
  const vuint magnitude = (vuint)v & 0x7fffffff;
  const vuint small = (vuint)((vfloat)magnitude + 0.5f) - 0x3f000000u;
  const vuint normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13;
  const vuint finite = vselect((vint)(magnitude < 0x38800000u), small, normal);
  const vuint overflow = vselect((vint)(magnitude > 0x7f800000u), vuint{} + 0x7e00u, vuint{} + 0x7c00u);
  return __builtin_convertvector(sign | vselect((vint)(magnitude >= 0x477ff000u), overflow, finite), vshort);
#endif
}

DLOPS_HD vint below(int count) {  // all bits of the first `count` lanes
  vint lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane < count;
}

// The first `count` elements at p, and zeros; masked, where there is an instruction for it: memcpy would be called.
template <class V>
DLOPS_HD V load_first(const void* p, int count) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64)
    return (V)_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p);
  else
    return (V)_mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), p);
#elif defined(__AVX2__)
  if constexpr (sizeof(V) == 32) return (V)_mm256_maskload_ps((const float*)p, (__m256i)below(count));
#endif
  V v{};
  __builtin_memcpy(&v, p, count * (sizeof(V) / kLanes));
  return v;
}

template <class V>
DLOPS_HD void store_first(void* p, V v, int count) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64)
    return _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), (__m512)v);
  else
    return _mm256_mask_storeu_epi16(p, __mmask16((1u << count) - 1), (__m256i)v);
#elif defined(__AVX2__)
  if constexpr (sizeof(V) == 32) return _mm256_maskstore_ps((float*)p, (__m256i)below(count), (__m256)v);
#endif
  __builtin_memcpy(p, &v, count * (sizeof(V) / kLanes));
}

template <class T>
using Packed = decltype(narrow(vfloat{}, (T*)nullptr));

template <class T>
DLOPS_HD vfloat load(const T* p, Full) {
  return widen(load_raw<Packed<T>>(p), p);
}

template <class T>
DLOPS_HD vfloat load(const T* p, Partial part) {  // elements past the end read as zero
  return widen(load_first<Packed<T>>(p, part.count), p);
}

template <class T>
DLOPS_HD void store(T* p, vfloat v, Full) {
  const Packed<T> packed = narrow(v, p);
  __builtin_memcpy(p, &packed, sizeof(packed));
}

template <class T>
DLOPS_HD void store(T* p, vfloat v, Partial part) {
  store_first(p, narrow(v, p), part.count);
}

// Non-temporal store: p must be aligned to sizeof(Packed<T>). Halves traffic when the line is not read again soon.
template <class T>
DLOPS_HD void stream(T* p, vfloat v, Full) {
  const Packed<T> packed = narrow(v, p);
#if defined(__AVX512F__)
  if constexpr (sizeof(packed) == 64) return _mm512_stream_ps((float*)p, (__m512)packed);
#endif
#if defined(__AVX__)
  if constexpr (sizeof(packed) == 32) return _mm256_stream_si256((__m256i*)p, (__m256i)packed);
#endif
#if defined(__x86_64__)
  if constexpr (sizeof(packed) == 16) return _mm_stream_si128((__m128i*)p, (__m128i)packed);
  if constexpr (sizeof(packed) == 8) return _mm_stream_si64((long long*)p, __builtin_bit_cast(long long, packed));
#endif
  __builtin_memcpy(p, &packed, sizeof(packed));
}

template <class T>
DLOPS_HD void stream(T* p, vfloat v, Partial part) {
  store(p, v, part);
}

// Orders non-temporal stores before whatever tells another thread that they are done.
DLOPS_HD void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

template <class T>
DLOPS_HD bool can_stream(const T* p, int64_t row_stride) {
  constexpr uint64_t kBytes = sizeof(Packed<T>);
  return (uint64_t)p % kBytes == 0 && row_stride * sizeof(T) % kBytes == 0;
}

DLOPS_HD vfloat keep(vfloat v, Full) { return v; }

DLOPS_HD vfloat keep(vfloat v, Partial part) {  // zero in the lanes that do not exist
  return vselect(below(part.count), v, vfloat{});
}

// Calls body(offset, Full | Partial) over [0, n).
template <class Body>
DLOPS_HD void for_lanes(int64_t n, Body body) {
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) body(j, Full{});
  if (j < n) body(j, Partial{int(n - j)});
}

DLOPS_HD float horizontal_sum(vfloat v) {  // pairwise
  float lane[kLanes];
  __builtin_memcpy(lane, &v, sizeof(v));
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
}

// K sums over [0, n) at once. term(offset, Full | Partial, vfloat (&t)[K]) sets the terms; those past the end are
// dropped. Each run of kRun elements is summed in float by kUnroll vectors of lanes, the runs in double: the error
// stays that of summing kRun / (kUnroll * kLanes) terms, however long the row.
template <int K, class Term>
DLOPS_HD void row_sums(int64_t n, double (&out)[K], Term term) {
  constexpr int kUnroll = K == 1 ? 4 : 2;
  constexpr int kStep = kUnroll * kLanes;
  constexpr int kRun = 512;
  for (int k = 0; k < K; ++k) out[k] = 0;
  for (int64_t run = 0; run < n; run += kRun) {
    const int64_t end = run + kRun < n ? run + kRun : n;
    vfloat sum[kUnroll][K] = {};
    int64_t j = run;
    for (; j + kStep <= end; j += kStep) {
#pragma GCC unroll 4
      for (int u = 0; u < kUnroll; ++u) {
        vfloat t[K];
        term(j + u * kLanes, Full{}, t);
        for (int k = 0; k < K; ++k) sum[u][k] += t[k];
      }
    }
    for (; j + kLanes <= end; j += kLanes) {
      vfloat t[K];
      term(j, Full{}, t);
      for (int k = 0; k < K; ++k) sum[0][k] += t[k];
    }
    if (j < end) {
      vfloat t[K];
      term(j, Partial{int(end - j)}, t);
      for (int k = 0; k < K; ++k) sum[1][k] += keep(t[k], Partial{int(end - j)});
    }
    for (int k = 0; k < K; ++k) {
      vfloat total = sum[0][k] + sum[1][k];
      if constexpr (kUnroll == 4) total += sum[2][k] + sum[3][k];
      out[k] += horizontal_sum(total);
    }
  }
}

}  // namespace DLOPS_ISA
}  // namespace dlops
