// The selective scan, forward. B batch, D dim, L steps, N states. Where B D fills the device, a block goes through all
// the steps of its channels. Else chunks run side by side, in three kernels: the state that each chunk alone ends in;
// from these the state before each chunk, since a chunk decays what comes in by exp(A times its steps' sum); the
// outputs.
#include "cuda/scan_tile.h"

namespace dlops::cuda {
namespace {

// kEnds: only the states that the chunks end in, from zero, into their checkpoints, and the sums of their steps.
template <class T, class Shape, bool kEnds>
__global__ void __launch_bounds__(kScanThreads, 4) scan_kernel(ScanForward p, bool split, float* totals) {
  DLOPS_SHARED(float, delta, [Shape::kSteps][Shape::kChannels + 1]);
  DLOPS_SHARED(float, u, [Shape::kSteps][Shape::kChannels + 1]);
  DLOPS_SHARED(float, y, [Shape::kSteps][Shape::kChannels + 1]);
  DLOPS_SHARED(float, B, [Shape::kSteps][Shape::kWidth]);
  DLOPS_SHARED(float, C, [Shape::kSteps][Shape::kWidth]);
  const ScanBlock<Shape> block(p, split);
  const int64_t size = p.dim * p.states, chunks = p.chunks();
  float h[Shape::kStates] = {}, a[Shape::kStates], b[Shape::kStates], c[Shape::kStates];
  load_states(p, block, p.A, a);
  if (!p.B.varies) load_states(p, block, static_cast<const float*>(p.B.data), b);
  if (!kEnds && !p.C.varies) load_states(p, block, static_cast<const float*>(p.C.data), c);
  const float skip = !kEnds && p.D && block.there() ? p.D[block.channel()] : 0.0f;
  if (!kEnds) copy_empty(p, block, p.initial_state, p.last_state);
  if (!kEnds && split) load_states(p, block, p.checkpoints + (block.batch * chunks + block.chunk) * size, h);

  ScanSequence sequence(p, block.batch, block.begin);
  float total = 0;
  for (int64_t begin = block.begin; begin < block.end; begin += Shape::kSteps) {
    const int steps = int(block.end - begin < Shape::kSteps ? block.end - begin : Shape::kSteps);
    __syncthreads();
    each_element(block, steps, p.delta.step, [&](int t, int i) {
      delta[t][i] = step_size(p, raw_step<T>(p, block.batch, block.first + i, begin + t));
    });
    each_element(block, steps, p.u.step,
                 [&](int t, int i) { u[t][i] = load_element<T>(p.u, block.batch, block.first + i, begin + t); });
    stage<T>(p, block, p.B, begin, steps, B);
    if (!kEnds) stage<T>(p, block, p.C, begin, steps, C);
    __syncthreads();

    for (int t = 0; t < steps; ++t) {
      const int64_t step = begin + t;
      if (step == sequence.end) sequence.next();
      if (step == sequence.begin)
        load_states(p, block, p.initial_state ? p.initial_state + sequence.index * size : nullptr, h);
      if (!kEnds && p.checkpoints && step % p.chunk == 0)
        store_states(p, block, h, p.checkpoints + (block.batch * chunks + step / p.chunk) * size);
      const float dt = block.there() ? delta[t][block.column] : 0.0f;
      const float input = block.there() ? u[t][block.column] : 0.0f;
      total += dt;
      read<Shape>(p.B, B, t, block.lane, b);
#pragma unroll
      for (int r = 0; r < Shape::kStates; ++r) h[r] = expf(dt * a[r]) * h[r] + (dt * input) * b[r];
      if constexpr (!kEnds) {
        read<Shape>(p.C, C, t, block.lane, c);
        float sum = 0;
#pragma unroll
        for (int r = 0; r < Shape::kStates; ++r) sum += h[r] * c[r];
        sum = sum_lanes<Shape>(sum);
        if (block.lane == 0) y[t][block.column] = sum + skip * input;
        if (step + 1 == sequence.end) store_states(p, block, h, p.last_state + sequence.index * size);
      }
    }
    if constexpr (!kEnds) {
      __syncthreads();
      each_element(block, steps, p.y.step, [&](int t, int i) {
        float value = y[t][i];
        if (p.z.data) {
          const float z = load_element<T>(p.z, block.batch, block.first + i, begin + t);
          value *= z * sigmoid(z);
        }
        store_element<T>(p.y, block.batch, block.first + i, begin + t, value);
      });
    }
  }
  if constexpr (kEnds) {
    store_states(p, block, h, p.checkpoints + (block.batch * chunks + block.chunk) * size);
    if (block.there() && block.lane == 0)
      totals[(block.batch * chunks + block.chunk) * p.dim + block.channel()] = total;
  }
}

template <class T, class Shape>
const char* launch(const ScanForward& p, bool split, float* totals, cudaStream_t stream) {
  const int64_t blocks = p.tasks() * (split ? p.chunks() : 1);
  if (blocks > kMaxGrid) return "too many channels for one launch";
  const dim3 grid{unsigned(blocks)}, threads{kScanThreads};
  if (split) {
    DLOPS_LAUNCH((scan_kernel<T, Shape, true>), grid, threads, 0, stream, p, split, totals);
    if (const char* error = launch_error()) return error;
    if (const char* error = scan_chunks(p, totals, p.checkpoints, false, stream)) return error;
  }
  DLOPS_LAUNCH((scan_kernel<T, Shape, false>), grid, threads, 0, stream, p, split, totals);
  return launch_error();
}

}  // namespace

ScanPlan scan_forward_plan(const Scan& p) {
  return with_shape(p.states, [&](auto shape) { return plan_of(p, decltype(shape)::kChannels); });
}

const char* scan_forward(const ScanForward& p, const ScanPlan& plan, float* totals, void* stream) {
  if (p.tasks() == 0) return nullptr;
  return with_dtype(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return with_shape(p.states, [&](auto shape) {
      return launch<T, decltype(shape)>(p, plan.split, totals, static_cast<cudaStream_t>(stream));
    });
  });
}

}  // namespace dlops::cuda
