// Atomic operations on global and shared memory, and fences.
#pragma once

#include <cstring>
#include <type_traits>

#include "simt/warp.h"

namespace dlops::simt {

enum class Atomic { kAdd, kMin, kMax, kAnd, kOr, kXor, kExchange, kIncrement, kDecrement };

// The old value. T: int, unsigned, unsigned long long, float, double.
template <class T>
T atomic(Atomic operation, T* p, T value);
template <class T>
T atomic_compare_exchange(T* p, T expected, T value);

// *p = update(*p) for a word of two elements.
template <class Update>
void atomic_update(uint32_t* p, Update update) {
  uint32_t old = atomic_compare_exchange(p, 0u, 0u);  // reads it
  for (uint32_t seen; (seen = atomic_compare_exchange(p, old, update(old))) != old;) old = seen;
}

void fence();

}  // namespace dlops::simt

#define DLOPS_SIMT_ATOMIC(name, operation, type) \
  inline type name(type* p, type value) { return dlops::simt::atomic(dlops::simt::Atomic::operation, p, value); }
#define DLOPS_SIMT_INTEGER_ATOMICS(type)                             \
  DLOPS_SIMT_ATOMIC(atomicAdd, kAdd, type)                           \
  DLOPS_SIMT_ATOMIC(atomicMin, kMin, type)                           \
  DLOPS_SIMT_ATOMIC(atomicMax, kMax, type)                           \
  DLOPS_SIMT_ATOMIC(atomicAnd, kAnd, type)                           \
  DLOPS_SIMT_ATOMIC(atomicOr, kOr, type)                             \
  DLOPS_SIMT_ATOMIC(atomicXor, kXor, type)                           \
  DLOPS_SIMT_ATOMIC(atomicExch, kExchange, type)                     \
  inline type atomicCAS(type* p, type expected, type value) {        \
    return dlops::simt::atomic_compare_exchange(p, expected, value); \
  }
DLOPS_SIMT_INTEGER_ATOMICS(int)
DLOPS_SIMT_INTEGER_ATOMICS(unsigned)
DLOPS_SIMT_INTEGER_ATOMICS(unsigned long long)
DLOPS_SIMT_ATOMIC(atomicAdd, kAdd, float)
DLOPS_SIMT_ATOMIC(atomicAdd, kAdd, double)
DLOPS_SIMT_ATOMIC(atomicExch, kExchange, float)
DLOPS_SIMT_ATOMIC(atomicInc, kIncrement, unsigned)
DLOPS_SIMT_ATOMIC(atomicDec, kDecrement, unsigned)
#undef DLOPS_SIMT_INTEGER_ATOMICS
#undef DLOPS_SIMT_ATOMIC
inline int atomicSub(int* p, int value) { return atomicAdd(p, -value); }
inline unsigned atomicSub(unsigned* p, unsigned value) { return atomicAdd(p, -value); }

inline void __threadfence_block() { dlops::simt::fence(); }
inline void __threadfence() { dlops::simt::fence(); }
