// Warp intrinsics: shuffles, votes, matches and reductions, as the lanes of the mask see them.
#pragma once

#include <cstdint>

#include "simt/runtime.h"

namespace dlops::simt {

// The source is a lane of the mask, or the caller's own lane where the intrinsic's range ends.
uint64_t shuffle(const char* name, unsigned mask, uint64_t value, unsigned source, const Where& where);
unsigned vote(const char* name, unsigned mask, bool predicate, const Where& where);  // the ballot
void warp_barrier(unsigned mask, const Where& where);
unsigned match(const char* name, unsigned mask, uint64_t value, const Where& where);  // the lanes with the same value

enum class Reduction { kAdd, kMin, kMax, kAnd, kOr, kXor };
uint32_t reduce(const char* name, unsigned mask, Reduction reduction, bool is_signed, uint32_t value,
                const Where& where);

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <class T>
T from_bits(uint64_t bits) {
  T value;
  __builtin_memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace dlops::simt

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              dlops::simt::Where where = dlops::simt::Where::current()) {
  const unsigned from = (dlops::simt::lane() & -width) | (source & (width - 1));
  return dlops::simt::from_bits<T>(dlops::simt::shuffle("__shfl_sync", mask, dlops::simt::to_bits(value), from, where));
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 dlops::simt::Where where = dlops::simt::Where::current()) {
  const unsigned lane = dlops::simt::lane(), offset = lane & (width - 1);
  return dlops::simt::from_bits<T>(dlops::simt::shuffle("__shfl_up_sync", mask, dlops::simt::to_bits(value),
                                                        offset < delta ? lane : lane - delta, where));
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   dlops::simt::Where where = dlops::simt::Where::current()) {
  const unsigned lane = dlops::simt::lane(), offset = lane & (width - 1);
  return dlops::simt::from_bits<T>(dlops::simt::shuffle("__shfl_down_sync", mask, dlops::simt::to_bits(value),
                                                        offset + delta >= unsigned(width) ? lane : lane + delta,
                                                        where));
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                  dlops::simt::Where where = dlops::simt::Where::current()) {
  const unsigned lane = dlops::simt::lane(), from = lane ^ lane_mask;
  return dlops::simt::from_bits<T>(dlops::simt::shuffle("__shfl_xor_sync", mask, dlops::simt::to_bits(value),
                                                        from > (lane | (width - 1)) ? lane : from, where));
}

inline unsigned __ballot_sync(unsigned mask, int predicate, dlops::simt::Where where = dlops::simt::Where::current()) {
  return dlops::simt::vote("__ballot_sync", mask, predicate, where);
}
inline int __any_sync(unsigned mask, int predicate, dlops::simt::Where where = dlops::simt::Where::current()) {
  return dlops::simt::vote("__any_sync", mask, predicate, where) != 0;
}
inline int __all_sync(unsigned mask, int predicate, dlops::simt::Where where = dlops::simt::Where::current()) {
  return dlops::simt::vote("__all_sync", mask, predicate, where) == mask;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, dlops::simt::Where where = dlops::simt::Where::current()) {
  return dlops::simt::match("__match_any_sync", mask, dlops::simt::to_bits(value), where);
}

#define DLOPS_SIMT_REDUCE(name, reduction)                                                                         \
  inline unsigned name(unsigned mask, unsigned value, dlops::simt::Where where = dlops::simt::Where::current()) {  \
    return dlops::simt::reduce(#name, mask, dlops::simt::Reduction::reduction, false, value, where);               \
  }                                                                                                                \
  inline int name(unsigned mask, int value, dlops::simt::Where where = dlops::simt::Where::current()) {            \
    return int(dlops::simt::reduce(#name, mask, dlops::simt::Reduction::reduction, true, unsigned(value), where)); \
  }
DLOPS_SIMT_REDUCE(__reduce_add_sync, kAdd)
DLOPS_SIMT_REDUCE(__reduce_min_sync, kMin)
DLOPS_SIMT_REDUCE(__reduce_max_sync, kMax)
DLOPS_SIMT_REDUCE(__reduce_and_sync, kAnd)
DLOPS_SIMT_REDUCE(__reduce_or_sync, kOr)
DLOPS_SIMT_REDUCE(__reduce_xor_sync, kXor)
#undef DLOPS_SIMT_REDUCE

inline void __syncwarp(unsigned mask = 0xffffffff, dlops::simt::Where where = dlops::simt::Where::current()) {
  dlops::simt::warp_barrier(mask, where);
}
