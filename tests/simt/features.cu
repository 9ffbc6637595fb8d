// One kernel, without a mistake, that uses everything the runtime knows. One warp multiplies tiles of A (16, 16 k) and
// B (16 k, 8) brought in by asynchronous copies; all warps then reduce, vote and count.
#include "core/async.h"
#include "core/atomic.h"
#include "core/mma.h"

namespace dlops {
namespace {

struct Params {
  const void* a;  // (16, 16 k)
  const void* b;  // (16 k, 8)
  int k;
  float* c;     // (blocks, 16, 8), all alike
  int* counts;  // see below
  float* sum;   // of all blocks' thread numbers
  void* pair;   // two elements, the number of threads in each
  double* sum64;
};

template <class T>
__global__ void __launch_bounds__(96) features(Params p) {
  using Row = Pack<T, 8>;
  DLOPS_SHARED(Row, a, [2][16][2]);
  DLOPS_SHARED(Row, b, [2][16]);
  DLOPS_DYNAMIC_SHARED(int, numbers);
  const int lane = threadIdx.x, warp = threadIdx.y, thread = warp * 32 + lane;
  const T* from_a = static_cast<const T*>(p.a);
  const T* from_b = static_cast<const T*>(p.b);

  const auto fetch = [&](int tile) {
    if (tile < p.k) {
      copy_async<16>(&a[tile % 2][lane / 2][lane % 2], from_a + (lane / 2 * p.k + tile) * 16 + lane % 2 * 8);
      copy_async<8>(reinterpret_cast<T*>(&b[tile % 2][lane / 2]) + lane % 2 * 4,
                    from_b + (tile * 16 + lane / 2) * 8 + lane % 2 * 4);
    }
    copy_async_commit();
  };
  if (warp == 0) {
    float c[4] = {};
    fetch(0);
    for (int tile = 0; tile < p.k; ++tile) {
      fetch(tile + 1);
      copy_async_wait<1>();
      __syncwarp();
      uint32_t fragment_a[4], fragment_b[2];
      load_matrices<4>(fragment_a, &a[tile % 2][lane % 16][lane / 16]);
      load_matrices<2, true>(fragment_b, &b[tile % 2][lane % 16]);
      mma_m16n8k16<T>(c, fragment_a, fragment_b);
      __syncwarp();
    }
    float* out = p.c + blockIdx.x * 16 * 8 + lane / 4 * 8 + lane % 4 * 2;
    *reinterpret_cast<float2*>(out) = make_float2(c[0], c[1]);
    *reinterpret_cast<float2*>(out + 64) = make_float2(c[2], c[3]);
  }

  numbers[thread] = thread;
  const int odd = __syncthreads_count(thread & 1);
  const int all = __syncthreads_and(numbers[95 - thread] == 95 - thread);
  const int any = __syncthreads_or(thread == 95);
  unsigned total = thread;
  for (int offset = 16; offset > 0; offset /= 2) total += __shfl_down_sync(0xffffffff, total, offset);
  total = __shfl_sync(0xffffffff, total, 0);
  const unsigned before = __shfl_up_sync(0xffffffff, unsigned(thread), 1, 8);  // in eights
  const bool reduced = __reduce_add_sync(0xffffffff, unsigned(thread)) == total &&
                       __reduce_max_sync(0xffffffff, thread - 100) == warp * 32 + 31 - 100 &&
                       before == unsigned(lane % 8 ? thread - 1 : thread) &&
                       __match_any_sync(0xffffffff, lane / 16) == (lane < 16 ? 0x0000ffffu : 0xffff0000u) &&
                       __ballot_sync(0xffffffff, lane & 1) == 0xaaaaaaaau && __any_sync(0xffffffff, lane == 3) &&
                       !__all_sync(0xffffffff, lane == 3);
  if (blockIdx.x == 0 && thread == 0) {
    p.counts[0] = odd;
    p.counts[1] = all;
    p.counts[2] = any;
    p.counts[3] = gridDim.x * 1000 + blockDim.x * blockDim.y;
  }
  atomicAdd(p.counts + 4, reduced ? 1 : 0);
  atomicMax(p.counts + 5, thread);
  atomicAdd(p.sum, float(thread));
  atomicAdd(p.sum64, double(thread) / 3);
  atomic_add(static_cast<Pack<T, 2>*>(p.pair), Pack<T, 2>::of({1.0f, -1.0f}));
}

}  // namespace
}  // namespace dlops

extern "C" __attribute__((visibility("default"))) void features(int half, unsigned blocks, dlops::Params p) {
  const size_t shared_bytes = 96 * sizeof(int);
  if (half)
    DLOPS_LAUNCH(dlops::features<dlops::float16>, dim3(blocks), dim3(32, 3), shared_bytes, nullptr, p);
  else
    DLOPS_LAUNCH(dlops::features<dlops::bfloat16>, dim3(blocks), dim3(32, 3), shared_bytes, nullptr, p);
}
