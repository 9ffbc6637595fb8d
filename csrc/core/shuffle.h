// Moving elements between vectors: transposition, and sums over the lanes of several vectors at once.
#pragma once

#include <utility>

#include "core/simd.h"

namespace dlops {
inline namespace DLOPS_ISA {

template <int... kLane>
DLOPS_HD vfloat shuffle(vfloat a, vfloat b, std::integer_sequence<int, kLane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, kLane...);
#else
  return __builtin_shuffle(a, b, vint{kLane...});
#endif
}

// Of two vectors seen as blocks of kBlock lanes, the even blocks (or the odd ones), a's and b's in turn.
template <int kBlock, bool kOdd, int... kLane>
DLOPS_HD vfloat pick(vfloat a, vfloat b, std::integer_sequence<int, kLane...>) {
  constexpr int kShift = kOdd ? kBlock : 0;
  return shuffle(a, b,
                 std::integer_sequence<int, (kLane + kShift - (kLane & kBlock) + (kLane & kBlock ? kLanes : 0))...>{});
}

template <int kBlock>
DLOPS_HD vfloat even(vfloat a, vfloat b) {
  return pick<kBlock, false>(a, b, std::make_integer_sequence<int, kLanes>{});
}

template <int kBlock>
DLOPS_HD vfloat odd(vfloat a, vfloat b) {
  return pick<kBlock, true>(a, b, std::make_integer_sequence<int, kLanes>{});
}

template <bool kOdd, int... kLane>
DLOPS_HD vfloat every_second(vfloat a, vfloat b, std::integer_sequence<int, kLane...>) {
  return shuffle(a, b, std::integer_sequence<int, 2 * kLane + kOdd...>{});
}

template <bool kHigh, int... kLane>
DLOPS_HD vfloat in_turn(vfloat a, vfloat b, std::integer_sequence<int, kLane...>) {
  return shuffle(a, b,
                 std::integer_sequence<int, kLane / 2 + (kHigh ? kLanes / 2 : 0) + (kLane % 2 ? kLanes : 0)...>{});
}

// The even (or the odd) lanes of a and then b, and what undoes it: the lanes of a and b in turn, the first kLanes or
// the last.
template <bool kOdd>
DLOPS_HD vfloat every_second(vfloat a, vfloat b) {
  return every_second<kOdd>(a, b, std::make_integer_sequence<int, kLanes>{});
}

template <bool kHigh>
DLOPS_HD vfloat in_turn(vfloat a, vfloat b) {
  return in_turn<kHigh>(a, b, std::make_integer_sequence<int, kLanes>{});
}

template <int kBlock = kLanes / 2>
DLOPS_HD void transpose(vfloat (&v)[kLanes]) {
  if constexpr (kBlock > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i & kBlock) continue;
      const vfloat a = v[i], b = v[i + kBlock];
      v[i] = even<kBlock>(a, b);
      v[i + kBlock] = odd<kBlock>(a, b);
    }
    transpose<kBlock / 2>(v);
  }
}

// out[k] = sum of the lanes of v[k], pairwise; v is overwritten. kLeft vectors are left, of kBlock lanes to add.
template <int kCount, int kLeft = kCount, int kBlock = kLanes / 2>
DLOPS_HD void sum_lanes(vfloat (&v)[kCount], float (&out)[kCount]) {
  if constexpr (kBlock > 0) {
    constexpr int kHalf = kLeft > 1 ? kLeft / 2 : 1;
#pragma GCC unroll 16
    for (int i = 0; i < kHalf; ++i) {
      const vfloat a = v[i], b = v[i + (kLeft > 1 ? kHalf : 0)];
      v[i] = even<kBlock>(a, b) + odd<kBlock>(a, b);
    }
    sum_lanes<kCount, kHalf, kBlock / 2>(v, out);
  } else {
#pragma GCC unroll 16
    for (int k = 0; k < kCount; ++k) out[k] = v[k % kLeft][k / kLeft * (kLanes * kLeft / kCount)];
  }
}

}  // namespace DLOPS_ISA
}  // namespace dlops
