// Warp-wide matrix products, m16n8k16, and the loads that bring operands from shared memory into their layout.
//
// Every lane of the warp takes part. Lane l holds, with g = l / 4 and t = l % 4 and two elements to a register, the
// lower first: of A (16, 16) rows g, g + 8, g, g + 8 at columns 2t, 2t, 2t + 8, 2t + 8; of B (16, 8) rows 2t, 2t + 8 of
// column g; of C and D (16, 8) rows g, g, g + 8, g + 8 at columns 2t, 2t + 1, 2t, 2t + 1. sm_80 and later.
#pragma once

#include "core/dtype.h"
#include "core/launch.h"

namespace dlops {
inline namespace DLOPS_ISA {

// c += a b, accumulated in float. T: bfloat16 or float16.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#if defined(__CUDACC__)

#define DLOPS_MMA(type, name)                                                                                         \
  template <>                                                                                                         \
  __device__ __forceinline__ void mma_m16n8k16<type>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                                                        \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                        \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                              \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                                          \
  }
DLOPS_MMA(bfloat16, "bf16")
DLOPS_MMA(float16, "f16")
#undef DLOPS_MMA

#else

template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  simt::mma_m16n8k16(c, a, b, [](uint16_t bits) { return to_float(T{bits}); });
}

#endif

// N matrices of 8 rows of 8 two-byte elements, 1, 2 or 4. Lane 8 m + r gives the address of row r of matrix m, 16-byte
// aligned, in shared memory; lane l gets elements 2 (l % 4) and the next of row l / 4 of every matrix, or where
// kTranspose, of column l / 4.
template <int N, bool kTranspose = false>
__device__ __forceinline__ void load_matrices(uint32_t (&r)[N], const void* row) {
  static_assert(N == 1 || N == 2 || N == 4);
#if defined(__CUDACC__)
  const uint32_t p = uint32_t(__cvta_generic_to_shared(row));
  if constexpr (N == 1 && !kTranspose)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(p) : "memory");
  else if constexpr (N == 1)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(p) : "memory");
  else if constexpr (N == 2 && !kTranspose)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(p)
                 : "memory");
  else if constexpr (N == 2)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(p)
                 : "memory");
  else if constexpr (!kTranspose)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(p)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(p)
                 : "memory");
#else
  simt::load_matrices(r, N, kTranspose, row);
#endif
}

}  // namespace DLOPS_ISA
}  // namespace dlops
