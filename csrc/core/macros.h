// Compiler switches shared by every kernel.
//
// Host kernels are compiled once per instruction set with DLOPS_ISA naming it. Everything inline lives in the
// inline namespace of that name: otherwise the linker could keep the AVX-512 copy of a function for the generic build.
#pragma once

#ifndef DLOPS_ISA
#define DLOPS_ISA common
#endif

#if defined(__CUDACC__)
#define DLOPS_HD __host__ __device__ __forceinline__
#else
#define DLOPS_HD inline __attribute__((always_inline))
#endif

// The instruction sets csrc/cpu is built for, best last: DLOPS_FOR_EACH_ISA(X) expands X(name) for each.
#if defined(__x86_64__)
#define DLOPS_FOR_EACH_ISA(X) X(generic) X(avx2) X(avx512)
#else
#define DLOPS_FOR_EACH_ISA(X) X(generic)
#endif
