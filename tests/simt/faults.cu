// Kernels with one mistake each, and beside some of them the same kernel without it. test_simt.py runs them by name.
#include <cstring>
#include <exception>
#include <string>

#include "core/async.h"
#include "core/launch.h"
#include "core/mma.h"
#include "simt/launch.h"

namespace {

__global__ void race(int* out, int n) {
  DLOPS_SHARED(int, total, [1]);
  total[0] = threadIdx.x;
}

// Each thread passes its value to the next one round the block.
__global__ void missing_barrier(int* out, int n) {
  DLOPS_SHARED(int, values, [64]);
  values[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = values[(threadIdx.x + 1) % 64];
}

__global__ void with_barrier(int* out, int n) {
  DLOPS_SHARED(int, values, [64]);
  values[threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = values[(threadIdx.x + 1) % 64];
}

// The second write may overtake the other warp's reads of the first value.
__global__ void missing_second_barrier(int* out, int n) {
  DLOPS_SHARED(int, values, [64]);
  for (int i = 0; i < 2; ++i) {
    values[threadIdx.x] = threadIdx.x + i;
    __syncthreads();
    out[i * 64 + threadIdx.x] = values[63 - threadIdx.x];
  }
}

// A shuffle exchanges values and orders no memory.
__global__ void missing_warp_barrier(int* out, int n) {
  DLOPS_SHARED(int, values, [32]);
  values[threadIdx.x] = __shfl_xor_sync(0xffffffff, int(threadIdx.x), 1);
  out[threadIdx.x] = __shfl_xor_sync(0xffffffff, values[threadIdx.x ^ 3], 1);
}

__global__ void with_warp_barriers(int* out, int n) {
  DLOPS_SHARED(int, values, [32]);
  const unsigned half = threadIdx.x < 16 ? 0x0000ffff : 0xffff0000;
  values[threadIdx.x] = threadIdx.x;
  __syncwarp(half);
  const int near = values[threadIdx.x ^ 1];
  __syncwarp();
  values[threadIdx.x ^ 16] = near;
  __syncwarp();
  out[threadIdx.x] = values[threadIdx.x];
}

__global__ void half_warp_barrier(int* out, int n) {
  DLOPS_SHARED(int, values, [32]);
  values[threadIdx.x] = threadIdx.x;
  __syncwarp(threadIdx.x < 16 ? 0x0000ffff : 0xffff0000);
  out[threadIdx.x] = values[threadIdx.x ^ 16];
}

__global__ void blocks_race(int* out, int n) { out[threadIdx.x] = blockIdx.x; }

__global__ void blocks_read_race(int* out, int n) {
  out[blockIdx.x] = blockIdx.x;
  out[8 + blockIdx.x] = out[blockIdx.x ^ 1];
}

__global__ void plain_and_atomic(int* out, int n) {
  atomicAdd(out, 1);
  if (threadIdx.x == 40) *out = 0;
}

__global__ void atomics(int* out, int n) { atomicAdd(out, 1); }

// Other blocks' updates may come before the first value.
__global__ void initialised_by_one_block(int* out, int n) {
  if (blockIdx.x == 0 && threadIdx.x == 0) *out = 0;
  __syncthreads();
  atomicAdd(out, 1);
}

// Thread 0 writes both bytes of a word, and each is its own.
__global__ void race_on_a_byte(int* out, int n) {
  DLOPS_SHARED(unsigned char, values, [64]);
  if (threadIdx.x == 0) {
    values[0] = 1;
    values[1] = 2;
  }
  if (threadIdx.x == 33) values[n] = 3;
}

__global__ void memset_race(int* out, int n) {
  DLOPS_SHARED(int, values, [64]);
  std::memset(values, 0, sizeof(values));
}

__global__ void memcpy_past_end(int* out, int n) {
  DLOPS_SHARED(int, values, [64]);
  if (threadIdx.x == 0) std::memcpy(out, values, 4 * n);
}

__global__ void large_copy_past_end(int* out, int n) {
  struct Large {
    int values[65];
  };
  DLOPS_SHARED(int, values, [64]);
  if (threadIdx.x == 0) *reinterpret_cast<Large*>(out) = *reinterpret_cast<Large*>(values);
}

// Asynchronous copies, each with something in its way before it lands. n says what.
__global__ void disturbed_copy(int* out, int n) {
  DLOPS_SHARED(int4, values, [16]);
  int* numbers = &values[0].x;
  int seen = 0;
  if (threadIdx.x == 0) dlops::copy_async<16>(values, out);
  dlops::copy_async_commit();
  if (n == 1 && threadIdx.x == 0) numbers[3] = 1;
  if (n == 2 && threadIdx.x == 0) seen = numbers[0];
  if (n == 3 && threadIdx.x == 0) out[0] = 1;
  if (n == 4 && threadIdx.x == 0) dlops::copy_async<4>(numbers + 1, out);
  __syncthreads();
  if (n == 5 && threadIdx.x == 1) out[1] = 1;
  if (n == 6 && threadIdx.x == 1) numbers[1] = 1;
  dlops::copy_async_wait();
  __syncthreads();
  out[64 + threadIdx.x] = numbers[threadIdx.x % 4] + seen;
}

// Others read what is copied: after a barrier, but the copier has not waited. A copy without a commit is in no group.
__global__ void late_copy(int* out, int n) {
  DLOPS_SHARED(int, values, [64]);
  dlops::copy_async<4>(values + threadIdx.x, out + threadIdx.x);
  if (n == 0) dlops::copy_async_wait();
  if (n == 1) dlops::copy_async_commit();
  if (n == 1)
    __syncwarp();
  else
    __syncthreads();
  out[64 + threadIdx.x] = values[threadIdx.x ^ 1];
  __syncthreads();
  dlops::copy_async_wait();
}

// More bytes than the copy has; n of 16.
__global__ void overlong_copy(int* out, int n) {
  DLOPS_SHARED(int4, values, [1]);
  if (threadIdx.x == 0) dlops::copy_async<16>(values, out, n);
  dlops::copy_async_wait();
}

// A lane loads what it has not waited for.
__global__ void load_of_a_copy(int* out, int n) {
  DLOPS_SHARED(int4, rows, [32]);
  uint32_t matrices[4];
  dlops::copy_async<16>(&rows[threadIdx.x], out + 128);
  dlops::copy_async_commit();
  if (n == 0) dlops::copy_async_wait();
  dlops::load_matrices<4>(matrices, &rows[threadIdx.x]);
  dlops::copy_async_wait();
  out[threadIdx.x] = matrices[0];
}

// The lanes of a warp execute different instructions.
__global__ void two_products(int* out, int n) {
  float c[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  if (threadIdx.x < 16)
    dlops::mma_m16n8k16<dlops::float16>(c, a, b);
  else
    dlops::mma_m16n8k16<dlops::bfloat16>(c, a, b);
  out[threadIdx.x] = int(c[0]);
}

__global__ void two_loads(int* out, int n) {
  DLOPS_SHARED(int4, rows, [32]);
  rows[threadIdx.x] = make_int4(0, 0, 0, 0);
  __syncwarp();
  uint32_t matrices[2];
  if (threadIdx.x < 16)
    dlops::load_matrices<2>(matrices, &rows[threadIdx.x]);
  else
    dlops::load_matrices<2, true>(matrices, &rows[threadIdx.x]);
  out[threadIdx.x] = matrices[0];
}

__global__ void misaligned_atomic(int* out, int n) {
  atomicAdd(reinterpret_cast<float*>(reinterpret_cast<char*>(out) + n), 1.0f);
}

template <int kThreads>
__global__ void __launch_bounds__(kThreads / 2 * 2, 1) bounded(int* out, int n) {
  out[threadIdx.x] = 1;
}

// Its code follows that of a kernel with bounds.
__global__ void __launch_bounds__(32) bounded_before(int* out, int n) { out[threadIdx.x] = 1; }
__global__ void unbounded(int* out, int n) { out[threadIdx.x] = 2; }

// Neighbouring bytes of one word are not one address.
__global__ void bytes(int* out, int n) {
  DLOPS_SHARED(unsigned char, values, [64]);
  values[threadIdx.x] = threadIdx.x;
  __syncthreads();
  reinterpret_cast<unsigned char*>(out)[threadIdx.x] = values[threadIdx.x ^ 1];
}

__global__ void past_end(int* out, int n) {
  DLOPS_SHARED(int, values, [64]);
  int* p = values;  // behind a pointer: the compiler knows no bounds
  p[threadIdx.x + 1] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = p[threadIdx.x];
}

__global__ void before_begin(int* out, int n) {
  DLOPS_SHARED(int, values, [64]);
  int* p = values;
  out[threadIdx.x] = p[int(threadIdx.x) - n];
}

__global__ void past_dynamic(int* out, int n) {
  DLOPS_DYNAMIC_SHARED(int, values);
  if (threadIdx.x == 0) values[n] = 0;
}

__global__ void outside_row(int* out, int n) {
  DLOPS_SHARED(int, values, [4][64]);
  values[threadIdx.x % 4][n] = 0;
  out[threadIdx.x] = 0;
}

__global__ void outside_registers(int* out, int n) {
  int values[4] = {1, 2, 3, 4};
  out[threadIdx.x] = values[n + threadIdx.x % 4];
}

__global__ void misaligned(int* out, int n) {
  DLOPS_SHARED(int, values, [64]);
  *reinterpret_cast<int4*>(values + n) = make_int4(1, 2, 3, 4);
  out[threadIdx.x] = values[0];
}

// Addresses that happen to be aligned on some chip: an array of int is aligned to 4 bytes, dynamic memory to 16.
__global__ void vector_of_ints(int* out, int n) {
  DLOPS_SHARED(int, values, [64]);
  DLOPS_DYNAMIC_SHARED(int, dynamic);
  struct alignas(32) Wide {
    int x;
  };
  if (n == 0) reinterpret_cast<int4*>(values)->x = 1;
  if (n == 1) reinterpret_cast<Wide*>(dynamic)->x = 1;
  if (n == 2) reinterpret_cast<int4*>(dynamic)->x = 1;
  out[threadIdx.x] = 1;
}

__global__ void past_global(int* out, int n) {
  if (threadIdx.x == 1) out[n] = 1;
}

__global__ void unwritten(int* out, int n) {
  DLOPS_SHARED(int, values, [64]);
  if (threadIdx.x < 63) values[threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];
}

__global__ void divergent_shuffle(int* out, int n) {
  int value = threadIdx.x;
  if (threadIdx.x < 16) value = __shfl_xor_sync(0xffffffff, value, 8);
  out[threadIdx.x] = value;
}

__global__ void shuffle_against_barrier(int* out, int n) {
  int value = threadIdx.x;
  if (threadIdx.x % 32 < 16)
    value = __shfl_xor_sync(0xffffffff, value, 8);
  else
    __syncthreads();
  out[threadIdx.x] = value;
}

__global__ void half_warp_shuffle(int* out, int n) {
  int value = threadIdx.x;
  if (threadIdx.x < 16) value = __shfl_xor_sync(0x0000ffff, value, 8);
  out[threadIdx.x] = value;
}

__global__ void shuffle_outside_mask(int* out, int n) {
  int value = threadIdx.x;
  if (threadIdx.x < 16) value = __shfl_xor_sync(0x0000ffff, value, 16);
  out[threadIdx.x] = value;
}

__global__ void caller_outside_mask(int* out, int n) { out[threadIdx.x] = __ballot_sync(0x0000ffff, threadIdx.x); }

__global__ void divergent_barrier(int* out, int n) {
  if (threadIdx.x < 32) {
    out[threadIdx.x] = 1;
    __syncthreads();
  } else {
    out[threadIdx.x] = 2;
    __syncthreads();
  }
}

__global__ void unreached_barrier(int* out, int n) {
  if (threadIdx.x == 40) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void too_much_shared(int* out, int n) {
  DLOPS_SHARED(int, values, [30000]);
  values[threadIdx.x] = 1;
  out[threadIdx.x] = values[threadIdx.x];
}

struct Kernel {
  const char* name;
  void (*code)(int*, int);
};
#define KERNEL(name) {#name, name}
constexpr Kernel kKernels[] = {KERNEL(race),
                               KERNEL(missing_barrier),
                               KERNEL(with_barrier),
                               KERNEL(missing_second_barrier),
                               KERNEL(missing_warp_barrier),
                               KERNEL(with_warp_barriers),
                               KERNEL(half_warp_barrier),
                               KERNEL(blocks_race),
                               KERNEL(blocks_read_race),
                               KERNEL(plain_and_atomic),
                               KERNEL(atomics),
                               KERNEL(initialised_by_one_block),
                               KERNEL(race_on_a_byte),
                               KERNEL(memset_race),
                               KERNEL(memcpy_past_end),
                               KERNEL(large_copy_past_end),
                               KERNEL(disturbed_copy),
                               KERNEL(late_copy),
                               KERNEL(overlong_copy),
                               KERNEL(load_of_a_copy),
                               KERNEL(two_products),
                               KERNEL(two_loads),
                               KERNEL(misaligned_atomic),
                               KERNEL(bounded<64>),
                               KERNEL(bounded<96>),
                               KERNEL(bounded_before),
                               KERNEL(unbounded),
                               KERNEL(bytes),
                               KERNEL(past_end),
                               KERNEL(before_begin),
                               KERNEL(past_dynamic),
                               KERNEL(outside_row),
                               KERNEL(outside_registers),
                               KERNEL(misaligned),
                               KERNEL(vector_of_ints),
                               KERNEL(past_global),
                               KERNEL(unwritten),
                               KERNEL(divergent_shuffle),
                               KERNEL(shuffle_against_barrier),
                               KERNEL(half_warp_shuffle),
                               KERNEL(shuffle_outside_mask),
                               KERNEL(caller_outside_mask),
                               KERNEL(divergent_barrier),
                               KERNEL(unreached_barrier),
                               KERNEL(too_much_shared)};

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void configure(unsigned long long seed, int poison, int detect_races, int threads) {
  dlops::simt::configure({seed, poison, detect_races != 0, threads});
}

// What was found, or what the launch was refused for, or null.
EXPORT const char* run(const char* name, unsigned grid, unsigned block, unsigned shared_bytes, int* out, int n) try {
  for (const Kernel& kernel : kKernels)
    if (!std::strcmp(kernel.name, name)) {
      DLOPS_LAUNCH(kernel.code, dim3(grid), dim3(block), shared_bytes, nullptr, out, n);
      const cudaError_t error = cudaGetLastError();
      return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
    }
  return "no such kernel";
} catch (const std::exception& error) {
  static thread_local std::string message;
  message = error.what();
  return message.c_str();
}
