// The selective scan, backward. Chunk by chunk from the last: the states before each tile of the chunk, from its
// checkpoint; then tile by tile from the last the states within it, in shared memory, and the gradients from the end of
// the tile to its beginning. Where chunks run side by side, what comes into each from those after it is found as in
// scan.cu. dB and dC are summed over the channels of a block: over those of a warp by shuffles, then over warps.
#include "cuda/scan_tile.h"

namespace dlops::cuda {
namespace {

template <class Shape>
using BackwardShape = ScanShape<Shape::kLanes, Shape::kStates, Shape::kSteps / 2>;

constexpr int kWarps = kScanThreads / kWarp;

__device__ __forceinline__ float silu_slope(float z, float s) { return s * (1 + z * (1 - s)); }

// The gradient of what the gate multiplies.
template <class T>
__device__ __forceinline__ float gated(const ScanBackward& p, int64_t batch, int64_t channel, int64_t step) {
  const float dy = load_element<T>(p.dy, batch, channel, step);
  if (!p.z.data) return dy;
  const float z = load_element<T>(p.z, batch, channel, step);
  return dy * z * sigmoid(z);
}

// The gradient that each chunk alone passes to the state before it, and the sums of the steps.
template <class T, class Shape>
__global__ void __launch_bounds__(kScanThreads, 4) scan_ends_kernel(ScanBackward p, ScanWorkspace work) {
  DLOPS_SHARED(float, delta, [Shape::kSteps][Shape::kChannels + 1]);
  DLOPS_SHARED(float, dproduct, [Shape::kSteps][Shape::kChannels + 1]);
  DLOPS_SHARED(float, C, [Shape::kSteps][Shape::kWidth]);
  const ScanBlock<Shape> block(p, true);
  const int64_t size = p.dim * p.states, at = block.batch * p.chunks() + block.chunk;
  float dh[Shape::kStates] = {}, a[Shape::kStates], c[Shape::kStates];
  load_states(p, block, p.A, a);
  if (!p.C.varies) load_states(p, block, static_cast<const float*>(p.C.data), c);
  ScanSequence sequence(p, block.batch, block.end - 1);
  float total = 0;
  for (int64_t end = block.end; end > block.begin; end -= Shape::kSteps) {
    const int steps = int(end - block.begin < Shape::kSteps ? end - block.begin : Shape::kSteps);
    const int64_t begin = end - steps;
    __syncthreads();
    each_element(block, steps, p.delta.step, [&](int t, int i) {
      delta[t][i] = step_size(p, raw_step<T>(p, block.batch, block.first + i, begin + t));
    });
    each_element(block, steps, p.dy.step,
                 [&](int t, int i) { dproduct[t][i] = gated<T>(p, block.batch, block.first + i, begin + t); });
    stage<T>(p, block, p.C, begin, steps, C);
    __syncthreads();
    for (int t = steps - 1; t >= 0; --t) {
      const int64_t step = begin + t;
      if (step < sequence.begin) sequence.previous();
      if (step + 1 == sequence.end)
        load_states(p, block, p.dlast_state ? p.dlast_state + sequence.index * size : nullptr, dh);
      const float dt = block.there() ? delta[t][block.column] : 0.0f;
      const float dp = block.there() ? dproduct[t][block.column] : 0.0f;
      total += dt;
      read<Shape>(p.C, C, t, block.lane, c);
#pragma unroll
      for (int r = 0; r < Shape::kStates; ++r) dh[r] = expf(dt * a[r]) * (dh[r] + dp * c[r]);
    }
  }
  store_states(p, block, dh, work.adjoints + at * size);
  if (block.there() && block.lane == 0) work.totals[at * p.dim + block.channel()] = total;
}

// The shared memory of a block.
template <class Shape>
struct BackwardTile {
  ChannelSteps<Shape> delta, slope, u, dproduct;  // in
  ChannelSteps<Shape> du, ddelta, y;              // out
  StateSteps<Shape> B, C;
  float before[Shape::kSteps][Shape::kStates][kScanThreads];  // the states before each step
  float parts[kWarps][Shape::kSteps][2][Shape::kWidth];       // of dB and dC
};

// Sums of kValues values each over the channels of a warp, of which every lane keeps as many as there are fewer
// channels: f(index, sum).
template <class Shape, int kValues, class F>
__device__ __forceinline__ void sum_channels(float (&value)[kValues], F f) {
  const int lane = int(threadIdx.x) % kWarp;
  int first = 0, count = kValues;
#pragma unroll
  for (int offset = kWarp / 2; offset >= Shape::kLanes; offset /= 2) {
    const bool upper = lane & offset;
    count /= 2;
    if (upper) first += count;
#pragma unroll
    for (int i = 0; i < kValues / 2; ++i) {
      if (i >= count) break;
      const float sent = upper ? value[i] : value[i + count];
      value[i] = (upper ? value[i + count] : value[i]) + __shfl_xor_sync(0xffffffffu, sent, offset);
    }
  }
#pragma unroll
  for (int i = 0; i < kValues; ++i)
    if (i < count) f(first + i, value[i]);
}

// h after the step.
template <class Shape>
__device__ __forceinline__ void advance(float dt, float input, const float (&a)[Shape::kStates],
                                        const float (&b)[Shape::kStates], float (&h)[Shape::kStates]) {
#pragma unroll
  for (int r = 0; r < Shape::kStates; ++r) h[r] = expf(dt * a[r]) * h[r] + (dt * input) * b[r];
}

template <class T, class Shape>
__global__ void __launch_bounds__(kScanThreads, 2)
    scan_backward_kernel(ScanBackward p, bool split, ScanWorkspace work) {
  DLOPS_DYNAMIC_SHARED(float, memory);
  auto& tile = *reinterpret_cast<BackwardTile<Shape>*>(memory);
  constexpr int kStates = Shape::kStates;
  const int64_t size = p.dim * p.states, chunks = p.chunks();
  const int64_t tiles = ((p.chunk < p.steps ? p.chunk : p.steps) + Shape::kSteps - 1) / Shape::kSteps;
#pragma unroll 1
  for (int turn = 0;; ++turn) {
    const ScanBlock<Shape> block(p, split, turn);
    if (block.channels <= 0) break;
    float* starts = work.states + (split ? block.batch * chunks + block.chunk : block.batch) * tiles * size;
    float dh[kStates] = {}, a[kStates], b[kStates], c[kStates];
    load_states(p, block, p.A, a);
    if (!p.B.varies) load_states(p, block, static_cast<const float*>(p.B.data), b);
    if (!p.C.varies) load_states(p, block, static_cast<const float*>(p.C.data), c);
    const float skip = p.D && block.there() ? p.D[block.channel()] : 0.0f;
    copy_empty(p, block, p.dlast_state, p.dinitial_state);
    if (split) load_states(p, block, work.adjoints + (block.batch * chunks + block.chunk) * size, dh);

    const auto stage_inputs = [&](int64_t begin, int steps) {
      each_element(block, steps, p.delta.step, [&](int t, int i) {
        const float raw = raw_step<T>(p, block.batch, block.first + i, begin + t);
        tile.delta[t][i] = step_size(p, raw);
        tile.slope[t][i] = p.delta_softplus ? sigmoid(raw) : 1.0f;
      });
      each_element(block, steps, p.u.step,
                   [&](int t, int i) { tile.u[t][i] = load_element<T>(p.u, block.batch, block.first + i, begin + t); });
      stage<T>(p, block, p.B, begin, steps, tile.B);
    };
    const auto at = [&](const ChannelSteps<Shape>& x, int t) { return block.there() ? x[t][block.column] : 0.0f; };
    const auto enter = [&](ScanSequence& sequence, int64_t step, float (&h)[kStates]) {
      if (step == sequence.end) sequence.next();
      if (step == sequence.begin)
        load_states(p, block, p.initial_state ? p.initial_state + sequence.index * size : nullptr, h);
    };

    const int64_t last_chunk = split ? block.chunk : chunks - 1, first_chunk = split ? block.chunk : 0;
    for (int64_t chunk = last_chunk; chunk >= first_chunk; --chunk) {
      const int64_t chunk_begin = chunk * p.chunk, row = block.batch * chunks + chunk;
      const int64_t chunk_end = chunk_begin + p.chunk < p.steps ? chunk_begin + p.chunk : p.steps;
      float h[kStates];
      load_states(p, block, p.checkpoints + row * size, h);
      for (int64_t begin = chunk_begin; begin < chunk_end; begin += Shape::kSteps) {
        store_states(p, block, h, starts + (begin - chunk_begin) / Shape::kSteps * size);
        if (begin + Shape::kSteps >= chunk_end) break;
        __syncthreads();
        stage_inputs(begin, Shape::kSteps);
        __syncthreads();
        ScanSequence sequence(p, block.batch, begin);
        for (int t = 0; t < Shape::kSteps; ++t) {
          enter(sequence, begin + t, h);
          read<Shape>(p.B, tile.B, t, block.lane, b);
          advance<Shape>(at(tile.delta, t), at(tile.u, t), a, b, h);
        }
      }

      float dA[kStates] = {}, dB[kStates] = {}, dC[kStates] = {}, dD = 0, dbias = 0;
      for (int64_t begin = chunk_begin + (chunk_end - chunk_begin - 1) / Shape::kSteps * Shape::kSteps;
           begin >= chunk_begin; begin -= Shape::kSteps) {
        const int steps = int(chunk_end - begin < Shape::kSteps ? chunk_end - begin : Shape::kSteps);
        __syncthreads();
        stage_inputs(begin, steps);
        each_element(block, steps, p.dy.step,
                     [&](int t, int i) { tile.dproduct[t][i] = gated<T>(p, block.batch, block.first + i, begin + t); });
        stage<T>(p, block, p.C, begin, steps, tile.C);
        __syncthreads();

        ScanSequence sequence(p, block.batch, begin);
        load_states(p, block, starts + (begin - chunk_begin) / Shape::kSteps * size, h);
        for (int t = 0; t < steps; ++t) {
          enter(sequence, begin + t, h);
#pragma unroll
          for (int r = 0; r < kStates; ++r) tile.before[t][r][threadIdx.x] = h[r];
          read<Shape>(p.B, tile.B, t, block.lane, b);
          advance<Shape>(at(tile.delta, t), at(tile.u, t), a, b, h);
        }

        float tile_dA[kStates] = {}, tile_dB[kStates] = {}, tile_dC[kStates] = {}, tile_dD = 0, tile_dbias = 0;
        for (int t = steps - 1; t >= 0; --t) {
          const int64_t step = begin + t;
          if (step < sequence.begin) sequence.previous();
          if (step + 1 == sequence.end)
            load_states(p, block, p.dlast_state ? p.dlast_state + sequence.index * size : nullptr, dh);
          const float dt = at(tile.delta, t), u = at(tile.u, t), dp = at(tile.dproduct, t);
          read<Shape>(p.B, tile.B, t, block.lane, b);
          read<Shape>(p.C, tile.C, t, block.lane, c);
          float dinput = 0, dstep = 0, product = 0, terms[2 * kStates];
#pragma unroll
          for (int r = 0; r < kStates; ++r) {
            const float decay = expf(dt * a[r]), decayed = decay * tile.before[t][r][threadIdx.x];
            const float after = decayed + (dt * u) * b[r];
            dh[r] += dp * c[r];
            dinput += dh[r] * b[r];
            product += after * c[r];
            const float ddecay = dh[r] * decayed;
            dstep += ddecay * a[r];
            tile_dA[r] += ddecay * dt;
            terms[r] = dh[r] * (dt * u);
            terms[kStates + r] = dp * after;
            tile_dB[r] += terms[r];
            tile_dC[r] += terms[kStates + r];
            dh[r] *= decay;
          }
          if (step == sequence.begin && p.dinitial_state)
            store_states(p, block, dh, p.dinitial_state + sequence.index * size);
          dinput = sum_lanes<Shape>(dinput);
          dstep = sum_lanes<Shape>(dstep);
          if (p.dz.data) product = sum_lanes<Shape>(product);
          const float ddelta = (dstep + dinput * u) * at(tile.slope, t);
          tile_dD += dp * u;
          tile_dbias += ddelta;
          if (block.there() && block.lane == 0) {
            tile.du[t][block.column] = dinput * dt + dp * skip;
            tile.ddelta[t][block.column] = ddelta;
            tile.y[t][block.column] = product + skip * u;
          }
          if (p.B.varies || p.C.varies) {
            float* part = &tile.parts[threadIdx.x / kWarp][t][0][0];
            sum_channels<Shape>(terms, [&](int i, float sum) {
              part[i / kStates * Shape::kWidth + block.lane * kStates + i % kStates] = sum;
            });
          }
        }
#pragma unroll
        for (int r = 0; r < kStates; ++r) dA[r] += tile_dA[r], dB[r] += tile_dB[r], dC[r] += tile_dC[r];
        dD += tile_dD, dbias += tile_dbias;
        __syncthreads();

        const auto write = [&](const ScanOutput& to, auto value) {
          if (to.data)
            each_element(block, steps, to.step, [&](int t, int i) {
              store_element<T>(to, block.batch, block.first + i, begin + t, value(t, i));
            });
        };
        write(p.du, [&](int t, int i) { return tile.du[t][i]; });
        write(p.ddelta, [&](int t, int i) { return tile.ddelta[t][i]; });
        write(p.dz, [&](int t, int i) {
          const float z = load_element<T>(p.z, block.batch, block.first + i, begin + t);
          const float dy = load_element<T>(p.dy, block.batch, block.first + i, begin + t);
          return dy * tile.y[t][i] * silu_slope(z, sigmoid(z));
        });
        const auto write_sums = [&](int which, float* to) {
          to += (((block.number * p.batch + block.batch) * p.groups + block.group) * p.steps + begin) * p.states;
          for (int i = int(threadIdx.x); i < steps * Shape::kWidth; i += kScanThreads) {
            const int t = i / Shape::kWidth, n = i % Shape::kWidth;
            if (n >= p.states) continue;
            float sum = 0;
            for (int warp = 0; warp < kWarps; ++warp) sum += tile.parts[warp][t][which][n];
            to[t * p.states + n] = turn ? to[t * p.states + n] + sum : sum;
          }
        };
        if (p.dB && p.B.varies) write_sums(0, p.dB);
        if (p.dC && p.C.varies) write_sums(1, p.dC);
      }

      if (p.dA) store_states(p, block, dA, p.dA + row * size);
      if (p.dB && !p.B.varies) store_states(p, block, dB, p.dB + row * size);
      if (p.dC && !p.C.varies) store_states(p, block, dC, p.dC + row * size);
      if (block.there() && block.lane == 0) {
        if (p.dD) p.dD[row * p.dim + block.channel()] = dD;
        if (p.ddelta_bias) p.ddelta_bias[row * p.dim + block.channel()] = dbias;
      }
    }
  }
}

template <class T, class Whole>
const char* launch(const ScanBackward& p, bool split, const ScanWorkspace& work, cudaStream_t stream) {
  using Shape = BackwardShape<Whole>;
  const int64_t blocks = p.tasks() * (split ? p.chunks() : 1);
  if (blocks > kMaxGrid) return "too many channels for one launch";
  const dim3 grid{unsigned(blocks)}, threads{kScanThreads};
  if (split) {
    ScanBackward alone = p;
    alone.block = Whole::kChannels;
    const int64_t narrow = alone.tasks() * p.chunks();
    if (narrow > kMaxGrid) return "too many channels for one launch";
    DLOPS_LAUNCH((scan_ends_kernel<T, Whole>), dim3(unsigned(narrow)), threads, 0, stream, alone, work);
    if (const char* error = launch_error()) return error;
    if (const char* error = scan_chunks(p, work.totals, work.adjoints, true, stream)) return error;
  }
  constexpr int64_t kShared = sizeof(BackwardTile<Shape>);
  const auto kernel = scan_backward_kernel<T, Shape>;
  if (const char* error = allow_shared(kernel, kShared, 0)) return error;
  DLOPS_LAUNCH(kernel, grid, threads, size_t(kShared), stream, p, split, work);
  return launch_error();
}

}  // namespace

ScanPlan scan_backward_plan(const Scan& p) {
  const int64_t channels = with_shape(p.states, [](auto shape) { return int64_t(decltype(shape)::kChannels); });
  if (!p.B.varies && !p.C.varies) return plan_of(p, channels);
  // The sums over blocks of dB and dC take no more memory than u, or four times the gradient where that is more.
  const int64_t most = std::max<int64_t>(4, p.dim / std::max<int64_t>(1, p.groups * p.states));
  return plan_of(p, std::max<int64_t>(1, ceil_div(ceil_div(p.dim / p.groups, channels), most)) * channels);
}

int64_t scan_backward_states(const Scan& p, const ScanPlan& plan) {
  const int64_t steps =
      with_shape(p.states, [](auto shape) { return int64_t(BackwardShape<decltype(shape)>::kSteps); });
  const int64_t chunks = plan.split ? p.chunks() : 1;
  return p.batch * chunks * ceil_div(std::min(p.chunk, p.steps), steps) * p.dim * p.states;
}

const char* scan_backward(const ScanBackward& p, const ScanPlan& plan, const ScanWorkspace& work, void* stream) {
  if (p.tasks() == 0) return nullptr;
  return with_dtype(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return with_shape(p.states, [&](auto shape) {
      return launch<T, decltype(shape)>(p, plan.split, work, static_cast<cudaStream_t>(stream));
    });
  });
}

}  // namespace dlops::cuda
