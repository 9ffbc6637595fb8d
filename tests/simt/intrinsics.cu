// One kernel, without a mistake, that calls each of CUDA's functions that csrc/simt has and features.cu leaves out, and
// compares the result: a line that finds another one leaves its number in `failed`.
#include <cmath>

#include "core/async.h"
#include "core/device.h"
#include "core/mma.h"

namespace dlops {
namespace {

struct Intrinsics {
  int* failed;
  int* ints;  // what atomics make of them, the test compares
  unsigned* unsigneds;
  unsigned long long* longs;
  float* floats;
  const int* table;  // 0, 1, 2 and so on
  int* moved;        // as much of it for each block
  float one;
};

#define EXPECT(condition) \
  if (!(condition)) atomicMax(p.failed, __LINE__)

__device__ bool near(float x, float y) { return fabsf(x - y) <= 1e-5f * fabsf(y); }

template <class T>
__device__ void atomics(T* word, int thread) {
  const T bit = T(1) << thread % 31;
  atomicAdd(word, T(1));
  atomicMin(word + 1, T(thread));
  atomicMax(word + 2, T(thread));
  atomicAnd(word + 3, ~bit);
  atomicOr(word + 4, bit);
  atomicXor(word + 5, bit);
  atomicExch(word + 6, T(thread));
  if (atomicCAS(word + 7, T(thread), T(thread + 1)) == T(thread)) atomicAdd(word + 8, T(1));
}

__device__ void atomics(const Intrinsics& p, int thread) {
  atomics(p.ints, thread);
  atomics(p.unsigneds, thread);
  atomics(p.longs, thread);
  atomicSub(p.ints + 9, 2);
  atomicSub(p.unsigneds + 9, 2u);
  atomicInc(p.unsigneds + 10, 4u);
  atomicDec(p.unsigneds + 11, 4u);
  const float old = atomicExch(p.floats, float(thread));
  EXPECT(old == -1 || (old >= 0 && old < 64));
  __threadfence_block();
  __threadfence();
}

__device__ void warps(const Intrinsics& p, int lane) {
  constexpr unsigned kAll = 0xffffffff;
  const unsigned low = lane < 16 ? 0x0000ffff : 0xffff0000;
  EXPECT(__reduce_add_sync(kAll, lane - 20) == 496 - 640 && __reduce_add_sync(kAll, unsigned(lane)) == 496u);
  EXPECT(__reduce_min_sync(kAll, lane - 20) == -20 && __reduce_min_sync(kAll, unsigned(lane) - 20) == 0u);
  EXPECT(__reduce_max_sync(kAll, lane - 20) == 11 && __reduce_max_sync(kAll, unsigned(lane) - 20) == 0xffffffffu);
  EXPECT(__reduce_and_sync(kAll, unsigned(lane) | 0x100) == 0x100 && __reduce_or_sync(kAll, 1u << lane) == kAll);
  EXPECT(__reduce_xor_sync(kAll, 3u << lane) == 1 && __reduce_add_sync(low, 1u) == 16);
  EXPECT(__shfl_sync(kAll, 1.5 * lane, lane ^ 5) == 1.5 * (lane ^ 5) &&
         __shfl_sync(kAll, lane, 3, 8) == lane / 8 * 8 + 3);
  EXPECT(__shfl_up_sync(kAll, lane, 4, 16) == (lane % 16 < 4 ? lane : lane - 4));
  EXPECT(__shfl_down_sync(kAll, lane, 4, 16) == (lane % 16 >= 12 ? lane : lane + 4));
  EXPECT(__shfl_xor_sync(kAll, (long long)(lane) << 40, 8, 16) == (long long)(lane ^ 8) << 40);
  EXPECT(__match_any_sync(kAll, (long long)(lane % 2) << 40) == (lane % 2 ? 0xaaaaaaaau : 0x55555555u));
  EXPECT(__ballot_sync(low, lane % 16 == 2) == (low & 0x00040004) && __any_sync(low, 0) == 0 && __all_sync(low, 1));
  __syncwarp(low);
}

__device__ void fast_math(const Intrinsics& p) {
  const float x = p.one, nan = x * NAN;
  EXPECT(near(__expf(x), 2.7182818f) && near(__exp10f(2 * x), 100) && near(__powf(2 * x, 10), 1024));
  EXPECT(near(__logf(10 * x), 2.3025851f) && near(__log2f(8 * x), 3) && near(__log10f(1000 * x), 3));
  EXPECT(near(__sinf(x), 0.84147098f) && near(__cosf(x), 0.54030231f) && near(__tanf(x), 1.5574077f));
  EXPECT(near(__fdividef(x, 3), 1.0f / 3) && near(rsqrtf(4 * x), 0.5f) && near(rcbrtf(8 * x), 0.5f));
  EXPECT(near(normcdff(x), 0.84134475f) && __saturatef(-x) == 0 && __saturatef(2 * x) == 1 && __saturatef(nan) == 0);
  EXPECT(__frcp_rn(3 * x) == 1.0f / 3 && __fsqrt_rn(2 * x) == 1.41421356f && __frsqrt_rn(16 * x) == 0.25f);
  EXPECT(__fdiv_rn(x, 3) == 1.0f / 3 && __fsub_rn(x, 3) == -2 && __fmaf_rn(x, 2, 3) == 5);
  const float near_one = x + 0x1p-12f;  // whose square's last bit is lost, unless it goes into the sum
  EXPECT(__fadd_rn(__fmul_rn(near_one, near_one), -x) == 0x1p-11f);
  EXPECT(__fmaf_rn(near_one, near_one, -x) == 0x1p-11f + 0x1p-24f);
}

__device__ void conversions(const Intrinsics& p) {
  const float x = p.one, nan = x * NAN;
  EXPECT(__float_as_int(-x) == int(0xbf800000) && __float_as_uint(x) == 0x3f800000);
  EXPECT(__int_as_float(0x40000000) == 2 && __uint_as_float(0xc0000000) == -2 && __int2float_rn(3) == 3);
  EXPECT(__float2int_rn(2.5f * x) == 2 && __float2int_rn(-3.5f * x) == -4 && __float2int_rz(-2.7f * x) == -2);
  EXPECT(__float2int_rd(-2.2f * x) == -3 && __float2int_ru(2.2f * x) == 3);
  EXPECT(__float2int_rn(3e10f * x) == 0x7fffffff && __float2int_rz(0x1p31f * x) == 0x7fffffff);
  EXPECT(__float2int_rd(-3e10f * x) == int(0x80000000) && __float2int_rz(-0x1p31f * x) == int(0x80000000));
  EXPECT(__float2int_rn(nan) == 0 && __float2int_ru(-nan) == 0);
}

__device__ void bits(const Intrinsics& p) {
  const int one = int(p.one);
  EXPECT(__popc(0xf0f0 * one) == 8 && __popcll(0xf0f0000000ffull * one) == 16 && __ffs(0x50 * one) == 5 &&
         __ffs(0) == 0);
  EXPECT(__clz(one) == 31 && __clz(0) == 32 && __clzll(one) == 63 && __brev(unsigned(one)) == 0x80000000);
  EXPECT(__umulhi(0x80000000u, 6u * one) == 3 && __mulhi(-0x40000000, 8 * one) == -2);
  EXPECT(__byte_perm(0x33221100, 0x77665544 * one, 0x7520) == 0x77552200 && __byte_perm(0x80, 0, 0x8808) == 0xffff80ff);
  EXPECT(min(one, -one) == -1 && max(one, -one) == 1 && min(3u, unsigned(one)) == 1 && max(3u, unsigned(one)) == 3);
  EXPECT(min(5ll, 4ll * one) == 4 && max(5ull, 4ull * one) == 5 && min(2.0, 1.0 * one) == 1 &&
         max(2.0, 1.0 * one) == 2);
  EXPECT(min(p.one, p.one * NAN) == 1 && max(p.one * NAN, p.one) == 1);
}

template <class T>
__device__ void halves(const Intrinsics& p, float half_step) {
  const float x = p.one;  // to the nearest, ties to even
  EXPECT(to_float(from_float<T>(x + half_step)) == 1 &&
         to_float(from_float<T>(x + 3 * half_step)) == 1 + 4 * half_step);
  EXPECT(to_float(from_float<T>(-x / 3)) != -x / 3 && to_float(from_float<T>(x * NAN)) != to_float(from_float<T>(x)));
  const Pack<T, 4> pack = Pack<T, 4>::of({x, -2 * x, 0.5f * x, 4 * x});
  EXPECT(pack.get(0) + pack.get(1) * pack.get(2) == 0 && pack.get(3) == 4);
}

__device__ void moves(const Intrinsics& p, int thread, int block) {
  DLOPS_DYNAMIC_SHARED(int, copied);
  struct alignas(16) Row {
    uint32_t words[4];
  };
  DLOPS_SHARED(Row, matrices, [4][8]);
  int4* to = reinterpret_cast<int4*>(p.moved) + 32 * block;
  const int4* from = reinterpret_cast<const int4*>(p.table);
  if (thread < 16) __stcg(to + thread, __ldg(from + thread));
  if (thread >= 16 && thread < 32) __stcs(to + thread, __ldcs(from + thread));
  __syncthreads();
  const int4 seen = __ldcg(to + thread % 32);
  EXPECT(seen.x == thread % 32 * 4 && seen.w == seen.x + 3 && __ldg(p.table + thread) == thread);
  if (thread == 33) {
    copy_async<4>(copied, p.table + 7);
    copy_async<4>(copied + 1, p.table + 8, 0);
    copy_async<8>(copied + 2, p.table + 10, 4);
    copy_async_commit();
    copy_async<16>(copied + 4, p.table + 12);
    copy_async_commit();
    copy_async<16>(copied + 8, p.table + 16, 8);
    copy_async_wait<1>();
    EXPECT(copied[0] == 7 && copied[1] == 0 && copied[2] == 10 && copied[3] == 0);
    copy_async_commit();
    copy_async_wait();
    EXPECT(copied[4] == 12 && copied[7] == 15 && copied[9] == 17 && copied[10] == 0);
  }
  // Four matrices whose 16-bit element (row, column) of matrix m is 64 m + 8 row + column.
  if (thread < 32)
    for (int word = 0; word < 4; ++word) {
      const uint32_t low = thread * 8 + 2 * word;
      matrices[thread / 8][thread % 8].words[word] = low | (low + 1) << 16;
    }
  __syncthreads();
  if (thread < 32) {
    const int row = thread / 4, column = thread % 4 * 2;
    const uint32_t plain = 8 * row + column, transposed = 8 * column + row;
    const auto pair = [](uint32_t low, uint32_t step) { return low | (low + step) << 16; };
    uint32_t one[1], two[2], four[4];
    load_matrices<1>(one, &matrices[0][thread % 8]);
    EXPECT(one[0] == pair(plain, 1));
    load_matrices<1, true>(one, &matrices[3][thread % 8]);
    EXPECT(one[0] == pair(192 + transposed, 8));
    load_matrices<2>(two, &matrices[thread / 8 % 2][thread % 8]);
    EXPECT(two[0] == pair(plain, 1) && two[1] == pair(64 + plain, 1));
    load_matrices<4, true>(four, &matrices[thread / 8][thread % 8]);
    EXPECT(four[0] == pair(transposed, 8) && four[2] == pair(128 + transposed, 8));
  }
}

__global__ void __launch_bounds__(64) intrinsics(Intrinsics p) {
  const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  EXPECT(gridDim.x == 1 && gridDim.y == 3 && gridDim.z == 3 && warpSize == 32);
  atomics(p, thread);
  warps(p, thread % 32);
  fast_math(p);
  conversions(p);
  bits(p);
  halves<bfloat16>(p, 0x1p-8f);
  halves<float16>(p, 0x1p-11f);
  moves(p, thread, block);
}

}  // namespace
}  // namespace dlops

extern "C" __attribute__((visibility("default"))) void intrinsics(dlops::Intrinsics p) {
  DLOPS_LAUNCH(dlops::intrinsics, dim3(1, 3, 3), dim3(8, 4, 2), 12 * sizeof(int), nullptr, p);
}
