// Selective scan on the host, forward. A task is a block of channels of one batch element; it goes through time in
// segments, all its channels through one before the next, so that B and C are converted once for all of them.
#include "cpu/scan_tile.h"

namespace dlops {
inline namespace DLOPS_ISA {

int64_t backward_scratch(const Scan& p);
void backward(const ScanBackward& p, int64_t begin, int64_t end, float* scratch);

namespace {

int64_t forward_scratch(const Scan& p) {
  const int64_t parts = p.complex ? 2 : 1, states = parts * p.states * kLanes;
  return vectors(p) * (4 * states + 2 * kLanes) + kSegment * (2 * parts * padded(p.states) + 4 * kLanes);
}

template <class T, class S>
void forward_task(const ScanForward& p, int64_t task, Scratch scratch) {
  constexpr int64_t kPer = kParts<S>;
  const Block block(p, task);
  const int64_t part = p.states * kLanes, size = kPer * part, width = padded(p.states);
  const int64_t sequence_size = kPer * p.dim * p.states, vectors = block.vectors();
  float* state = scratch.take(vectors * size);
  float* A = scratch.take(vectors * size);
  float* constant_B = scratch.take(vectors * size);
  float* constant_C = scratch.take(vectors * size);
  float* D = scratch.take(vectors * kLanes);
  float* bias = scratch.take(vectors * kLanes);
  float* B = scratch.take(kSegment * kPer * width);
  float* C = scratch.take(kSegment * kPer * width);
  float* delta = scratch.take(kSegment * kLanes);
  float* input = scratch.take(kSegment * kLanes);
  float* y = scratch.take(kSegment * kLanes);
  float* z = scratch.take(kSegment * kLanes);

  const auto offset = [&](int64_t q) { return kPer * (block.channel + q * kLanes) * p.states; };
  load_channels(p.D, block, D);
  load_channels(p.delta_bias, block, bias);
  for (int64_t q = 0; q < vectors; ++q) {
    load_states<S>(p.A + offset(q), p.states, block.lanes(q), A + q * size);
    if (!p.B.varies)
      load_states<S>(static_cast<const float*>(p.B.data) + offset(q), p.states, block.lanes(q), constant_B + q * size);
    if (!p.C.varies)
      load_states<S>(static_cast<const float*>(p.C.data) + offset(q), p.states, block.lanes(q), constant_C + q * size);
  }

  for_segments<false>(p, block.batch, kSegment, [&](Segment s) {
    const int64_t count = s.end - s.begin;
    if (p.B.varies) load_coefficient<S, T>(p, p.B, block.batch, block.group, s.begin, s.end, B);
    if (p.C.varies) load_coefficient<S, T>(p, p.C, block.batch, block.group, s.begin, s.end, C);
    for (int64_t q = 0; q < vectors; ++q) {
      const int64_t channel = block.channel + q * kLanes;
      const int lanes = block.lanes(q);
      float* h = state + q * size;
      if (s.first)
        load_states<S>(p.initial_state ? p.initial_state + s.sequence * sequence_size + offset(q) : nullptr, p.states,
                       lanes, h);
      if (p.checkpoints && count && s.begin % p.chunk == 0) {
        const int64_t chunks = (p.steps + p.chunk - 1) / p.chunk;
        store_states<S>(p.checkpoints + (block.batch * chunks + s.begin / p.chunk) * sequence_size + offset(q),
                        p.states, lanes, h);
      }
      load_lanes(at<T>(p.delta, block.batch, channel, s.begin), p.delta.channel, p.delta.step, lanes, count, delta);
      load_lanes(at<T>(p.u, block.batch, channel, s.begin), p.u.channel, p.u.step, lanes, count, input);
      const vfloat reach = finish_delta(p, delta, bias + q * kLanes, count);
      const vfloat skip = load(D + q * kLanes, Full{});
      for (int64_t t = 0; t < count * kLanes; t += kLanes) {
        const vfloat u = load(input + t, Full{});
        store(y + t, p.D ? skip * u : vfloat{}, Full{});
        store(input + t, load(delta + t, Full{}) * u, Full{});
      }
      for_kinds(p, [&](auto varies_B, auto varies_C) DLOPS_INLINE {
        const Coefficient b =
            varies_B() ? Coefficient{B, kPer * width, width} : Coefficient{constant_B + q * size, 0, part};
        const Coefficient c =
            varies_C() ? Coefficient{C, kPer * width, width} : Coefficient{constant_C + q * size, 0, part};
        for_tiles<S>(p.states, [&](auto tile, int64_t n) DLOPS_INLINE {
          advance<S, tile(), varies_B(), varies_C(), false>({count, delta, input, y, reach}, A + q * size, h, part, b,
                                                            c, n, nullptr);
        });
      });
      if (p.z.data) {
        load_lanes(at<T>(p.z, block.batch, channel, s.begin), p.z.channel, p.z.step, lanes, count, z);
        for (int64_t t = 0; t < count * kLanes; t += kLanes) {
          const vfloat gate = load(z + t, Full{});
          store(y + t, load(y + t, Full{}) * (gate * sigmoid(gate)), Full{});
        }
      }
      store_lanes(at<T>(p.y, block.batch, channel, s.begin), p.y.channel, p.y.step, lanes, count, y);
      if (s.last) store_states<S>(p.last_state + s.sequence * sequence_size + offset(q), p.states, lanes, h);
    }
  });
}

template <class T>
void forward_typed(const ScanForward& p, int64_t begin, int64_t end, float* scratch) {
  for (int64_t task = begin; task < end; ++task)
    p.complex ? forward_task<T, Complex>(p, task, {scratch}) : forward_task<T, vfloat>(p, task, {scratch});
}

void forward(const ScanForward& p, int64_t begin, int64_t end, float* scratch) {
  switch (p.dtype) {
    case Dtype::kFloat32: return forward_typed<float>(p, begin, end, scratch);
    case Dtype::kBFloat16: return forward_typed<bfloat16>(p, begin, end, scratch);
    case Dtype::kFloat16: return forward_typed<float16>(p, begin, end, scratch);
  }
}

}  // namespace

const ScanKernels scan_kernels = {kLanes, forward_scratch, backward_scratch, forward, backward};

}  // namespace DLOPS_ISA
}  // namespace dlops
