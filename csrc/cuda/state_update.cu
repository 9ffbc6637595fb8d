// Decoding steps, bound by the memory of the states, each of which is read and written once. The scan's: a channel has
// lanes of a warp, a lane packs of its states, and a block channels of one batch element and head. The convolution's:
// a thread has a channel of a batch element.
#include "cuda/conv1d_tile.h"
#include "cuda/state_update.h"

namespace dlops::cuda {
namespace {

constexpr int kUpdateThreads = 128;

// The entry of a state that a batch element has, or a negative number where the indices name none: its result is 0.
template <class Update>
__device__ __forceinline__ int64_t entry_of(const Update& p, int64_t batch) {
  const int64_t entry = p.indices ? p.indices[batch] : batch;
  return entry < p.entries ? entry : -1;
}

// kVec numbers from the n-th on; where they are single, `stride` apart.
template <int kVec, class T>
__device__ __forceinline__ void load_numbers(const T* p, int64_t n, int64_t stride, float (&to)[kVec]) {
  if constexpr (kVec == 1) {
    to[0] = to_float(p[n * stride]);
  } else {
    constexpr int kPack = kVec < kFullVec<T> ? kVec : kFullVec<T>;
#pragma unroll
    for (int first = 0; first < kVec; first += kPack) {
      const Pack<T, kPack> pack = load_pack<kPack>(p + n + first);
#pragma unroll
      for (int i = 0; i < kPack; ++i) to[first + i] = pack.get(i);
    }
  }
}

// threadIdx.x is the lane, threadIdx.y the channel among the block's. There are `blocks` of them for a head.
template <class T, class H, int kVec>
__global__ void __launch_bounds__(kUpdateThreads, 8) scan_update_kernel(ScanUpdate p, unsigned blocks) {
  const unsigned heads = unsigned(p.heads), row = blockIdx.x / blocks, head = row % heads, batch = row / heads;
  const int64_t channel = int64_t(blockIdx.x % blocks) * blockDim.y + threadIdx.y, entry = entry_of(p, batch);
  const bool there = channel < p.channels;
  float x = 0, sum = 0;
  if (there && entry >= 0) {
    x = to_float(*at<const T>(p.x, batch, head, channel));
    float step = to_float(*at<const T>(p.dt, batch, head, channel));
    if (p.dt_bias.data) step += *at<const float>(p.dt_bias, 0, head, channel);
    if (p.dt_softplus) step = softplus(step);
    const float input = step * x;
    const unsigned group = head / (heads / unsigned(p.groups));
    const T *B = at<const T>(p.B, batch, group, 0), *C = at<const T>(p.C, batch, group, 0);
    const float* A = at<const float>(p.A, head, channel, 0);
    H* state = at<H>(p.state, entry, head, channel);
    for (int n = int(threadIdx.x) * kVec; n < p.states; n += int(blockDim.x) * kVec) {
      float h[kVec], rate[kVec], b[kVec], c[kVec];
      load_numbers(state, n, p.state.stride[3], h);
      if (kVec == 1 || p.A.stride[2] == 0) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) rate[i] = A[n * p.A.stride[2]];
      } else {
        load_numbers(A, n, 1, rate);
      }
      load_numbers(B, n, p.B.stride[2], b);
      load_numbers(C, n, p.C.stride[2], c);
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        h[i] = expf(step * rate[i]) * h[i] + input * b[i];
        sum += h[i] * c[i];
      }
      if constexpr (kVec == 1)
        state[n * p.state.stride[3]] = from_float<H>(h[0]);
      else
        store_global(state + n, Pack<H, kVec>::of(h));
    }
  }
  sum = warp_sum(sum, int(blockDim.x));
  if (!there || threadIdx.x > 0) return;
  T* y = at<T>(p.y, batch, head, channel);
  if (entry < 0) {
    *y = from_float<T>(0.0f);
    return;
  }
  if (p.D.data) sum += *at<const float>(p.D, 0, head, channel) * x;
  if (p.z.data) sum *= Silu(nullptr).value(to_float(*at<const T>(p.z, batch, head, channel)));
  *y = from_float<T>(sum);
}

// There are `blocks` of channels for a batch element.
template <class T>
__global__ void __launch_bounds__(kUpdateThreads, 8) conv_update_kernel(ConvUpdate p, unsigned blocks) {
  const int64_t batch = blockIdx.x / blocks, channel = int64_t(blockIdx.x % blocks) * blockDim.x + threadIdx.x;
  if (channel >= p.channels) return;
  const int64_t entry = entry_of(p, batch), length = p.state_len;
  const bool circular = p.seen && length > 0;
  const int64_t oldest = circular ? (p.seen[batch] % length + length) % length : 0;  // its place in the state
  const T* x = at<const T>(p.x, batch, channel, 0);
  T* y = at<T>(p.y, batch, channel, 0);
  if (entry < 0) {
    for (int64_t t = 0; t < p.steps; ++t) y[t * p.y.stride[2]] = from_float<T>(0.0f);
    return;
  }
  T* state = at<T>(p.state, entry, channel, 0);
  const int64_t weight = channel * p.weight.stride[1];
  for (int64_t t = 0; t < p.steps; ++t) {
    float sum = p.bias ? parameter(p.bias, p.bias_dtype, channel) : 0.0f;
    for (int64_t tap = 0; tap < p.width; ++tap) {
      const int64_t from = t - (p.width - 1 - tap) * p.dilation;
      float value;
      if (from >= 0) {
        value = to_float(x[from * p.x.stride[2]]);
      } else {
        const int64_t place = oldest + length + from;
        value = to_float(state[(place < length ? place : place - length) * p.state.stride[2]]);
      }
      sum += value * parameter(p.weight.data, p.weight_dtype, weight + tap * p.weight.stride[2]);
    }
    y[t * p.y.stride[2]] = from_float<T>(p.silu ? Silu(nullptr).value(sum) : sum);
  }
  const int64_t kept = p.steps < length ? length - p.steps : 0, first = p.steps - (length - kept);
  if (!circular)
    for (int64_t i = 0; i < kept; ++i) state[i * p.state.stride[2]] = state[(i + p.steps) * p.state.stride[2]];
  int64_t place = circular ? (oldest + first) % length : kept;
  for (int64_t t = first; t < p.steps; ++t) {
    state[place * p.state.stride[2]] = x[t * p.x.stride[2]];
    place = place + 1 < length ? place + 1 : 0;
  }
}

// How many threads a block has: few where more would leave processors without one.
template <class F>
int threads_of(F blocks) {
  const int64_t enough = processors();
  int threads = kUpdateThreads;
  while (threads > kWarp && blocks(threads) < enough) threads /= 2;
  return threads;
}

template <class T, class H, int kVec>
const char* launch(const ScanUpdate& p, cudaStream_t stream) {
  int lanes = 1;
  while (lanes < kWarp && lanes * kVec < p.states) lanes *= 2;
  const auto blocks = [&](int threads) { return ceil_div(p.channels, threads / lanes); };
  const int threads = threads_of([&](int threads) { return p.batch * p.heads * blocks(threads); });
  const int64_t grid = p.batch * p.heads * blocks(threads);
  if (grid > kMaxGrid) return "too many channels for one launch";
  const auto kernel = scan_update_kernel<T, H, kVec>;
  DLOPS_LAUNCH(kernel, dim3(unsigned(grid)), dim3(lanes, threads / lanes), 0, stream, p, unsigned(blocks(threads)));
  return launch_error();
}

// Whether the rows of x, of adjacent numbers, begin at multiples of `count` of them.
template <class T, class Pointer>
bool in_packs(const Strided<Pointer>& x, int rank, int count) {
  const int64_t bytes = count * int64_t(sizeof(T));
  bool whole = x.stride[rank] == 1 && reinterpret_cast<uintptr_t>(x.data) % bytes == 0;
  for (int i = 0; i < rank; ++i) whole &= x.stride[i] % count == 0;
  return whole;
}

template <class T, class H>
const char* launch(const ScanUpdate& p, cudaStream_t stream) {
  constexpr int kVec = kFullVec<H>, kOfT = std::min(kVec, kFullVec<T>), kOfA = kFullVec<float>;
  const bool packs = p.states % kVec == 0 && in_packs<H>(p.state, 3, kVec) && in_packs<T>(p.B, 2, kOfT) &&
                     in_packs<T>(p.C, 2, kOfT) && (p.A.stride[2] == 0 || in_packs<float>(p.A, 2, kOfA));
  return packs ? launch<T, H, kVec>(p, stream) : launch<T, H, 1>(p, stream);
}

}  // namespace

const char* selective_state_update(const ScanUpdate& p, void* stream) {
  if (p.batch * p.heads * p.channels == 0) return nullptr;
  return with_dtype(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto s = static_cast<cudaStream_t>(stream);
    return p.state_dtype == p.dtype ? launch<T, T>(p, s) : launch<T, float>(p, s);
  });
}

const char* causal_conv1d_update(const ConvUpdate& p, void* stream) {
  if (p.batch * p.channels == 0) return nullptr;
  const auto blocks = [&](int threads) { return ceil_div(p.channels, threads); };
  const int threads = threads_of([&](int threads) { return p.batch * blocks(threads); });
  const int64_t grid = p.batch * blocks(threads);
  if (grid > kMaxGrid) return "too many channels for one launch";
  return with_dtype(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    DLOPS_LAUNCH(conv_update_kernel<T>, dim3(unsigned(grid)), dim3(threads), 0, static_cast<cudaStream_t>(stream), p,
                 unsigned(blocks(threads)));
    return launch_error();
  });
}

}  // namespace dlops::cuda
