// CUDA's built-in types, for the host.
#pragma once

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};

#define DLOPS_SIMT_VECTOR(type, name, align2, align4)              \
  struct alignas(align2) name##2 { type x, y; };                   \
  struct alignas(align4) name##4 { type x, y, z, w; };             \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; } \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
DLOPS_SIMT_VECTOR(float, float, 8, 16)
DLOPS_SIMT_VECTOR(int, int, 8, 16)
DLOPS_SIMT_VECTOR(unsigned, uint, 8, 16)
DLOPS_SIMT_VECTOR(short, short, 4, 8)
DLOPS_SIMT_VECTOR(unsigned short, ushort, 4, 8)
#undef DLOPS_SIMT_VECTOR

struct alignas(16) double2 {
  double x, y;
};

struct CUstream_st;
using cudaStream_t = CUstream_st*;
