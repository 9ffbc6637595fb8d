// Selective scan on the host, backward. A task is a block of channels of one batch element; it goes back through time
// from one checkpoint to the one before. For every kTile states it recomputes what happened after the checkpoint, keeps
// it, and runs the reverse recurrence dh[t-1] = conj(exp(delta[t] A)) (dh[t] + conj(C[t]) dy[t]).
#include "cpu/scan_tile.h"

namespace dlops {
inline namespace DLOPS_ISA {
namespace {

// Lanes arrays of a segment, beside those of Steps.
struct Gradients {
  const float* dy;         // of y before the gate
  float *ddelta, *dinput;  // those of the decays, and of input; added to
};

// Where the gradients of B and C go: rows of sums over the channels if it varies, else Lanes of sums over the steps.
struct CoefficientGradient {
  float* data;  // null if a sum over the channels is not asked for
  int64_t step;
};

DLOPS_HD void put_parts(vfloat s, vfloat* out) { out[0] = s; }

DLOPS_HD void put_parts(Complex s, vfloat* out) {
  out[0] = s.re;
  out[1] = s.im;
}

template <class S>
DLOPS_HD void add_state(float* p, int64_t part, S s) {
  store_state(p, part, load_state<S>(p, part) + s);
}

template <int kCount>
DLOPS_HD void add(const float* sums, float* out) {
  if constexpr (kCount == 4) {
    typedef float Four __attribute__((vector_size(16)));
    const Four total = load_raw<Four>(out) + load_raw<Four>(sums);
    __builtin_memcpy(out, &total, sizeof(total));
  } else {
    for (int k = 0; k < kCount; ++k) out[k] += sums[k];
  }
}

// kCount states back through a segment. dh and dA are Lanes; `kept` is what advance() kept.
template <class S, int kCount, bool kVariesB, bool kVariesC>
void retreat(const Steps s, const Gradients g, const float* A, float* dA, float* dh, int64_t part, Coefficient B,
             Coefficient C, CoefficientGradient dB, CoefficientGradient dC, int64_t n, const float* kept) {
  constexpr int kPer = kParts<S>;
  constexpr int64_t kOne = kPer * kLanes;
  S rate[kCount], drate[kCount] = {}, dstate[kCount], constant_dB[kCount] = {}, constant_dC[kCount] = {};
  for (int i = 0; i < kCount; ++i) {
    rate[i] = conjugate(load_state<S>(A + (n + i) * kLanes, part));
    dstate[i] = load_state<S>(dh + (n + i) * kLanes, part);
  }
  const bool sums = (kVariesB && dB.data) || (kVariesC && dC.data);
  for (int64_t t = s.count - 1; t >= 0; --t) {
    const vfloat delta = load(s.delta + t * kLanes, Full{}), input = load(s.input + t * kLanes, Full{});
    const vfloat dy = load(g.dy + t * kLanes, Full{}) * float(kPer);  // of C . h without the factor of product()
    vfloat ddelta{}, dinput{};
    vfloat lanes[8] = {};  // dB and dC of this step, parts adjacent
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) {
      const float* before = kept + (t * kCount + i) * 2 * kOne + kOne;
      const float* after = kept + ((t + 1) * kCount + i) * 2 * kOne;
      const S a = load_state<S>(after, kLanes);
      const S dc = conjugate(load_state<S>(after + kOne, kLanes)) * dy;
      dstate[i] = dstate[i] + conjugate(C.at<S, kVariesC>(t, n + i)) * dy;
      const S db = dstate[i] * input;
      dinput += real_part(dstate[i] * conjugate(B.at<S, kVariesB>(t, n + i)));
      dstate[i] = dstate[i] * conjugate(a);
      const S dexponent = dstate[i] * conjugate(load_state<S>(before, kLanes));  // the gradient of delta A
      drate[i] = drate[i] + dexponent * delta;
      ddelta += real_part(dexponent * rate[i]);
      if constexpr (kVariesB)
        put_parts(db, lanes + i * kPer);
      else
        constant_dB[i] = constant_dB[i] + db;
      if constexpr (kVariesC)
        put_parts(dc, lanes + 4 + i * kPer);
      else
        constant_dC[i] = constant_dC[i] + dc;
    }
    store(g.ddelta + t * kLanes, load(g.ddelta + t * kLanes, Full{}) + ddelta, Full{});
    store(g.dinput + t * kLanes, load(g.dinput + t * kLanes, Full{}) + dinput, Full{});
    if (sums) {
      float total[8];
      sum_lanes(lanes, total);
      if (kVariesB && dB.data) add<kCount * kPer>(total, dB.data + t * dB.step + n * kPer);
      if (kVariesC && dC.data) add<kCount * kPer>(total + 4, dC.data + t * dC.step + n * kPer);
    }
  }
  for (int i = 0; i < kCount; ++i) {
    add_state(dA + (n + i) * kLanes, part, drate[i]);
    store_state(dh + (n + i) * kLanes, part, dstate[i]);
    if constexpr (!kVariesB) add_state(dB.data + (n + i) * kLanes, part, constant_dB[i]);
    if constexpr (!kVariesC) add_state(dC.data + (n + i) * kLanes, part, constant_dC[i]);
  }
}

template <class T, class S>
void backward_task(const ScanBackward& p, int64_t task, Scratch scratch) {
  constexpr int64_t kPer = kParts<S>;
  const Block block(p, task);
  const int64_t part = p.states * kLanes, size = kPer * part, width = padded(p.states);
  const int64_t sequence_size = kPer * p.dim * p.states, vectors = block.vectors();
  const int64_t chunks = (p.steps + p.chunk - 1) / p.chunk, longest = p.chunk < p.steps ? p.chunk : p.steps;
  float* A = scratch.take(vectors * size);
  float* dA = scratch.take(vectors * size);
  float* dstate = scratch.take(vectors * size);
  float* constant_B = scratch.take(vectors * size);
  float* constant_C = scratch.take(vectors * size);
  float* constant_dB = scratch.take(vectors * size);
  float* constant_dC = scratch.take(vectors * size);
  float* D = scratch.take(vectors * kLanes);
  float* bias = scratch.take(vectors * kLanes);
  float* dD = scratch.take(vectors * kLanes);
  float* dbias = scratch.take(vectors * kLanes);
  float* state = scratch.take(size);
  float* B = scratch.take(longest * kPer * width);
  float* C = scratch.take(longest * kPer * width);
  float* delta = scratch.take(longest * kLanes);
  float* u = scratch.take(longest * kLanes);
  float* input = scratch.take(longest * kLanes);
  float* y = scratch.take(longest * kLanes);
  float* z = scratch.take(longest * kLanes);
  float* dy = scratch.take(longest * kLanes);
  float* ddelta = scratch.take(longest * kLanes);
  float* dinput = scratch.take(longest * kLanes);
  float* kept = scratch.take((longest + 1) * kTile<S> * 2 * kPer * kLanes);

  const auto offset = [&](int64_t q) { return kPer * (block.channel + q * kLanes) * p.states; };
  load_channels(p.D, block, D);
  load_channels(p.delta_bias, block, bias);
  load_channels(nullptr, block, dD);
  load_channels(nullptr, block, dbias);
  for (int64_t q = 0; q < vectors; ++q) {
    const int lanes = block.lanes(q);
    load_states<S>(p.A + offset(q), p.states, lanes, A + q * size);
    load_states<S>(nullptr, p.states, lanes, dA + q * size);
    load_states<S>(nullptr, p.states, lanes, constant_dB + q * size);
    load_states<S>(nullptr, p.states, lanes, constant_dC + q * size);
    if (!p.B.varies)
      load_states<S>(static_cast<const float*>(p.B.data) + offset(q), p.states, lanes, constant_B + q * size);
    if (!p.C.varies)
      load_states<S>(static_cast<const float*>(p.C.data) + offset(q), p.states, lanes, constant_C + q * size);
  }
  // This block's rows of the partial sums of dB and dC.
  const int64_t row = ((block.index * p.batch + block.batch) * p.groups + block.group) * p.steps;
  const int64_t row_size = kPer * p.states;

  for_segments<true>(p, block.batch, p.chunk, [&](Segment s) {
    const int64_t count = s.end - s.begin;
    if (p.B.varies) load_coefficient<S, T>(p, p.B, block.batch, block.group, s.begin, s.end, B);
    if (p.C.varies) load_coefficient<S, T>(p, p.C, block.batch, block.group, s.begin, s.end, C);
    float* dB = p.B.varies && p.dB ? p.dB + (row + s.begin) * row_size : nullptr;
    float* dC = p.C.varies && p.dC ? p.dC + (row + s.begin) * row_size : nullptr;
    for (float* sums : {dB, dC})
      if (sums) __builtin_memset(sums, 0, count * row_size * sizeof(float));
    for (int64_t q = 0; q < vectors; ++q) {
      const int64_t channel = block.channel + q * kLanes;
      const int lanes = block.lanes(q);
      const auto states_of = [&](const float* p) { return p ? p + s.sequence * sequence_size + offset(q) : nullptr; };
      const auto stage = [&](const ScanTensor& x, float* out) {
        load_lanes(at<T>(x, block.batch, channel, s.begin), x.channel, x.step, lanes, count, out);
      };
      const auto write = [&](const ScanOutput& x, const float* in) {
        if (x.data) store_lanes(at<T>(x, block.batch, channel, s.begin), x.channel, x.step, lanes, count, in);
      };
      float* dh = dstate + q * size;
      if (s.last) load_states<S>(states_of(p.dlast_state), p.states, lanes, dh);
      const float* start = s.first
                               ? states_of(p.initial_state)
                               : p.checkpoints + (block.batch * chunks + s.begin / p.chunk) * sequence_size + offset(q);
      load_states<S>(start, p.states, lanes, state);
      stage(p.delta, delta);
      stage(p.u, u);
      stage(p.dy, dy);
      if (p.z.data) stage(p.z, z);
      const vfloat reach = finish_delta(p, delta, bias + q * kLanes, count);
      const vfloat skip = load(D + q * kLanes, Full{});
      for (int64_t t = 0; t < count * kLanes; t += kLanes) {
        const vfloat u_t = load(u + t, Full{});
        store(input + t, load(delta + t, Full{}) * u_t, Full{});
        store(y + t, p.D ? skip * u_t : vfloat{}, Full{});
        store(ddelta + t, vfloat{}, Full{});
        store(dinput + t, vfloat{}, Full{});
        if (p.z.data) {  // dy becomes the gradient before the gate; z what is to be multiplied by y for its own
          const vfloat gate = load(z + t, Full{}), slope = sigmoid(gate), d = load(dy + t, Full{});
          store(z + t, d * slope * (1.0f + gate * (1.0f - slope)), Full{});
          store(dy + t, d * (gate * slope), Full{});
        }
      }
      const Steps steps{count, delta, input, y, reach};
      const Gradients gradients{dy, ddelta, dinput};
      for_kinds(p, [&](auto varies_B, auto varies_C) DLOPS_INLINE {
        const Coefficient b =
            varies_B() ? Coefficient{B, kPer * width, width} : Coefficient{constant_B + q * size, 0, part};
        const Coefficient c =
            varies_C() ? Coefficient{C, kPer * width, width} : Coefficient{constant_C + q * size, 0, part};
        const CoefficientGradient db{varies_B() ? dB : constant_dB + q * size, row_size};
        const CoefficientGradient dc{varies_C() ? dC : constant_dC + q * size, row_size};
        for_tiles<S>(p.states, [&](auto tile, int64_t n) DLOPS_INLINE {
          advance<S, tile(), varies_B(), varies_C(), true>(steps, A + q * size, state, part, b, c, n, kept);
          retreat<S, tile(), varies_B(), varies_C()>(steps, gradients, A + q * size, dA + q * size, dh, part, b, c, db,
                                                     dc, n, kept);
        });
      });
      vfloat total_dD{}, total_dbias{};  // of this segment: the sums over many steps are of sums over few
      for (int64_t t = 0; t < count * kLanes; t += kLanes) {
        const vfloat d = load(delta + t, Full{}), u_t = load(u + t, Full{}), dx = load(dinput + t, Full{});
        const vfloat dy_t = load(dy + t, Full{});
        const vfloat slope = p.delta_softplus ? -expm1_negative(-d) : splat<vfloat>(1);  // sigmoid, from softplus
        const vfloat dd = (load(ddelta + t, Full{}) + dx * u_t) * slope;
        total_dbias += dd;
        total_dD += dy_t * u_t;
        store(ddelta + t, dd, Full{});
        store(dinput + t, p.D ? dx * d + skip * dy_t : dx * d, Full{});
        if (p.z.data) store(z + t, load(z + t, Full{}) * load(y + t, Full{}), Full{});
      }
      add_state(dD + q * kLanes, 0, total_dD);
      add_state(dbias + q * kLanes, 0, total_dbias);
      write(p.du, dinput);
      write(p.ddelta, ddelta);
      write(p.dz, z);
      if (s.first && p.dinitial_state)
        store_states<S>(p.dinitial_state + s.sequence * sequence_size + offset(q), p.states, lanes, dh);
    }
  });

  for (int64_t q = 0; q < vectors; ++q) {
    const int lanes = block.lanes(q);
    const int64_t first = block.batch * sequence_size + offset(q),
                  channel = block.batch * p.dim + block.channel + q * kLanes;
    if (p.dA) store_states<S>(p.dA + first, p.states, lanes, dA + q * size);
    if (p.dB && !p.B.varies) store_states<S>(p.dB + first, p.states, lanes, constant_dB + q * size);
    if (p.dC && !p.C.varies) store_states<S>(p.dC + first, p.states, lanes, constant_dC + q * size);
    if (p.dD) store_lanes(p.dD + channel, 1, 0, lanes, 1, dD + q * kLanes);
    if (p.ddelta_bias) store_lanes(p.ddelta_bias + channel, 1, 0, lanes, 1, dbias + q * kLanes);
  }
}

template <class T>
void backward_typed(const ScanBackward& p, int64_t begin, int64_t end, float* scratch) {
  for (int64_t task = begin; task < end; ++task)
    p.complex ? backward_task<T, Complex>(p, task, {scratch}) : backward_task<T, vfloat>(p, task, {scratch});
}

}  // namespace

int64_t backward_scratch(const Scan& p) {
  const int64_t parts = p.complex ? 2 : 1, states = parts * p.states * kLanes;
  const int64_t longest = p.chunk < p.steps ? p.chunk : p.steps;
  return vectors(p) * (7 * states + 4 * kLanes) + states + longest * (2 * parts * padded(p.states) + 8 * kLanes) +
         (longest + 1) * 4 * 2 * kLanes;
}

void backward(const ScanBackward& p, int64_t begin, int64_t end, float* scratch) {
  switch (p.dtype) {
    case Dtype::kFloat32: return backward_typed<float>(p, begin, end, scratch);
    case Dtype::kBFloat16: return backward_typed<bfloat16>(p, begin, end, scratch);
    case Dtype::kFloat16: return backward_typed<float16>(p, begin, end, scratch);
  }
}

}  // namespace DLOPS_ISA
}  // namespace dlops
