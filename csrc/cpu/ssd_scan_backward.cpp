// Mamba-2's scan on the host, backward. A task is a block of heads of one batch element; a first pass over its chunks
// keeps the state before each, a second takes them from the last to the first.
//
// The gradient of dt[t] A is the sum, over all pairs of a step before t that writes to the state and a step from t on
// that reads it, of what the pair contributes: pairs inside the chunk, those with one step outside, those with both. A
// pair counts at every step between the two, and so would the rounding of a sum that it is part of: these are double.
#include "cpu/ssd_tile.h"

namespace dlops {
inline namespace DLOPS_ISA {
namespace {

int64_t most_chunks(const SsdScan& p) { return (p.steps + kChunk - 1) / kChunk + (p.cu_seqlens ? p.sequences : 1); }

constexpr int kHalf = kLanes / 2;
typedef double vdouble __attribute__((vector_size(kHalf * 8)));

DLOPS_HD vdouble load_double(const float* p) {
  typedef float Half __attribute__((vector_size(kHalf * 4)));
  return __builtin_convertvector(load_raw<Half>(p), vdouble);
}

DLOPS_HD double sum_of(vdouble v) {
  double sum = 0;
  for (int i = 0; i < kHalf; ++i) sum += v[i];
  return sum;
}

double dot(const float* a, const float* b, int64_t count) {  // count is of whole tiles
  vdouble even{}, odd{};
  for (int64_t i = 0; i < count; i += kLanes) {
    even += load_double(a + i) * load_double(b + i);
    odd += load_double(a + i + kHalf) * load_double(b + i + kHalf);
  }
  return sum_of(even + odd);
}

// Per chunk and head; the sums over s < t of the pairs (t, s), and over t > s of (t, s).
struct Pairs {
  double by_reader[kChunk], by_writer[kChunk];
  double before[kChunk];  // pairs of a step before the chunk and t
  double after[kChunk];   // pairs of t and a step after the chunk
  double both;            // of a step before and one after
};

// matrix = products times decays, and the gradient of products is added to dproducts. dmatrix[t][s] = dy[t] . x[s].
void pair_up(const Steps& s, int64_t count, const float* products, const float* dmatrix, float* matrix,
             float* dproducts, Pairs& pairs) {
  __builtin_memset(pairs.by_writer, 0, sizeof(pairs.by_writer));
  vint lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  for (int64_t t = 0; t < count; ++t) {
    float inside[kChunk];
    for_decays(s, t, [&](int64_t i, vfloat decay, vint seen) DLOPS_INLINE {
      const int64_t at = t * kChunk + i;
      const vfloat product = load(products + at, Full{});
      store(matrix + at, vselect(seen, product * decay, vfloat{}), Full{});
      const vfloat dproduct = vselect(seen, load(dmatrix + at, Full{}) * decay * load(s.dt + i, Full{}), vfloat{});
      store(dproducts + at, load(dproducts + at, Full{}) + dproduct, Full{});
      store(inside + i, vselect(lane + int32_t(i) < int32_t(t), dproduct * product, vfloat{}), Full{});
    });
    vdouble sum{};
    for (int64_t i = 0; i < t; i += kHalf) {
      const vdouble pairs_of_t = load_double(inside + i);
      sum += pairs_of_t;
      const vdouble total = load_raw<vdouble>(pairs.by_writer + i) + pairs_of_t;
      __builtin_memcpy(pairs.by_writer + i, &total, sizeof(total));
    }
    pairs.by_reader[t] = sum_of(sum);
  }
}

// The gradients of dt[t] A, from the last step on.
void sum_pairs(const Pairs& pairs, int64_t count, double (&out)[kChunk]) {
  double written = 0;
  for (int64_t t = 0; t < count; ++t) {
    out[t] = pairs.both + written;
    written += pairs.after[t];
  }
  double inside = 0, read = 0;
  for (int64_t t = count - 1; t >= 0; --t) {
    inside += pairs.by_reader[t] - pairs.by_writer[t];
    read += pairs.before[t];
    out[t] += inside + read;
  }
}

// gradient[t] = factor[t] a[t] S over the elements of x or dy; weights[t] = gradient[t] . other[t], and it is added to
// sum. state is scratch for S (states, headdim) transposed.
template <class Factor>
DLOPS_HD void coefficient_gradient(const SsdScan& p, int64_t count, const float* S, const float* a, const float* other,
                                   Factor factor, float* state, float* gradient, double* weights, float* sum) {
  const int64_t row = whole_tiles(p.headdim), states = whole_tiles(p.states);
  transpose_into(S, row, p.states, p.headdim, state, states);
  product(count, states, p.headdim, {a, row, 1}, state, states, gradient, states, false);
  for (int64_t t = 0; t < count; ++t) {
    float* g = gradient + t * states;
    scale(g, factor(t), states, g);
    weights[t] = dot(g, other + t * states, states);
    for (int64_t i = 0; i < states; i += kLanes)
      store(sum + t * states + i, load(sum + t * states + i, Full{}) + load(g + i, Full{}), Full{});
  }
}

// dy becomes the gradient before the gate, dz that of the gate's input, in place of z.
void gate_backward(const float* y, int64_t size, float* dy, float* z) {
  for (int64_t i = 0; i < size; i += kLanes) {
    const vfloat gate = load(z + i, Full{}), s = sigmoid(gate), d = load(dy + i, Full{});
    store(z + i, d * load(y + i, Full{}) * s * (1.0f + gate * (1.0f - s)), Full{});
    store(dy + i, d * gate * s, Full{});
  }
}

template <class T>
void store_dt(const SsdBackward& p, int64_t batch, int64_t head, int64_t begin, int64_t count, const float* in) {
  T* out = static_cast<T*>(p.ddt) + (batch * p.steps + begin) * p.heads + head;
  for (int64_t t = 0; t < count; ++t) out[t * p.heads] = from_float<T>(in[t]);
}

void store_dt(const SsdBackward& p, int64_t batch, int64_t head, int64_t begin, int64_t count, const float* in) {
  switch (p.dt_dtype) {
    case Dtype::kFloat32: return store_dt<float>(p, batch, head, begin, count, in);
    case Dtype::kBFloat16: return store_dt<bfloat16>(p, batch, head, begin, count, in);
    case Dtype::kFloat16: return store_dt<float16>(p, batch, head, begin, count, in);
  }
}

template <class T>
void backward_task(const SsdBackward& p, int64_t task, Scratch scratch) {
  const Heads block(p, task);
  const int64_t row = whole_tiles(p.headdim), states = whole_tiles(p.states), size = p.states * row;
  float* before = scratch.take(most_chunks(p) * block.heads * size);  // S before each chunk
  float* dstate = scratch.take(block.heads * size);
  float* transposed_state = scratch.take(p.headdim * states);
  float* B = scratch.take(kChunk * states);
  float* C = scratch.take(kChunk * states);
  float* dB = scratch.take(kChunk * states);
  float* dC = scratch.take(kChunk * states);
  float* gradient = scratch.take(kChunk * states);
  float* transposed = scratch.take(kChunk * (states > row ? states : row));
  float* products = scratch.take(kChunk * kChunk);
  float* dproducts = scratch.take(kChunk * kChunk);
  float* matrix = scratch.take(kChunk * kChunk);
  float* dmatrix = scratch.take(kChunk * kChunk);
  float* x = scratch.take(kChunk * row);
  float* dy = scratch.take(kChunk * row);
  float* y = scratch.take(kChunk * row);  // then the gradient of dt x
  float* z = scratch.take(kChunk * row);
  float* weighted = scratch.take(kChunk * row);
  float* D = scratch.take(row);
  double* dD = reinterpret_cast<double*>(scratch.take(2 * block.heads * row));
  double* dA = reinterpret_cast<double*>(scratch.take(2 * block.heads));
  double* dbias = reinterpret_cast<double*>(scratch.take(2 * block.heads));
  for (double* sums : {dA, dbias}) __builtin_memset(sums, 0, block.heads * sizeof(double));
  __builtin_memset(dD, 0, block.heads * row * sizeof(double));

  const auto state_at = [&](const Chunk& c, int64_t i) {
    return (c.sequence * p.heads + block.head + i) * p.headdim * p.states;
  };
  int64_t index = 0;
  for_chunks(p, block.batch, false, [&](Chunk c) DLOPS_INLINE {
    const int64_t count = c.end - c.begin;
    if (!c.last) load_chunk<T>(p.B, block.batch, block.group, c.begin, count, p.states, B);
    for (int64_t i = 0; i < block.heads; ++i) {
      float* S = before + (index * block.heads + i) * size;
      if (c.first) load_state_matrix(p, p.initial_states ? p.initial_states + state_at(c, i) : nullptr, S);
      if (c.last) continue;
      Steps s;
      load_steps(p, block.batch, block.head + i, c.begin, count, s);
      load_chunk<T>(p.x, block.batch, block.head + i, c.begin, count, p.headdim, x);
      float* next = S + block.heads * size;
      __builtin_memcpy(next, S, size * sizeof(float));
      advance_state(p, s, count, B, x, weighted, next);
    }
    ++index;
  });

  for_chunks(p, block.batch, true, [&](Chunk c) DLOPS_INLINE {
    const int64_t count = c.end - c.begin;
    --index;
    if (count) {
      load_chunk<T>(p.B, block.batch, block.group, c.begin, count, p.states, B);
      load_chunk<T>(p.C, block.batch, block.group, c.begin, count, p.states, C);
      inner_products(C, B, count, p.states, transposed, products);
      for (float* sums : {dB, dC}) __builtin_memset(sums, 0, count * states * sizeof(float));
      __builtin_memset(dproducts, 0, kChunk * kChunk * sizeof(float));
    }
    for (int64_t i = 0; i < block.heads; ++i) {
      const int64_t head = block.head + i;
      const float* S = before + (index * block.heads + i) * size;
      float* dS = dstate + i * size;
      if (c.last) load_state_matrix(p, p.dfinal_states ? p.dfinal_states + state_at(c, i) : nullptr, dS);
      if (count) {
        Steps s;
        Pairs pairs;
        load_steps(p, block.batch, head, c.begin, count, s);
        load_chunk<T>(p.x, block.batch, head, c.begin, count, p.headdim, x);
        load_chunk<T>(p.dy, block.batch, head, c.begin, count, p.headdim, dy);
        load_skip(p, head, D);
        const int64_t at = ((block.batch * p.steps + c.begin) * p.heads + head) * p.headdim;
        const int64_t step = p.heads * p.headdim;
        if (p.z.data) {
          load_chunk<T>(p.z, block.batch, head, c.begin, count, p.headdim, z);
          chunk_output(p, s, count, C, x, D, products, S, matrix, y);
          gate_backward(y, count * row, dy, z);
          for (int64_t t = 0; p.dz && t < count; ++t)
            store_row(z + t * row, p.headdim, static_cast<T*>(p.dz) + at + t * step);
        }
        for (int64_t j = 0; p.dD && j < row; j += kHalf) {
          vdouble sum = load_raw<vdouble>(dD + i * row + j);
          for (int64_t t = 0; t < count; ++t) sum += load_double(x + t * row + j) * load_double(dy + t * row + j);
          __builtin_memcpy(dD + i * row + j, &sum, sizeof(sum));
        }
        inner_products(dy, x, count, p.headdim, transposed, dmatrix);
        pair_up(s, count, products, dmatrix, matrix, dproducts, pairs);
        coefficient_gradient(
            p, count, S, dy, C, [&](int64_t t) { return s.decay[t]; }, transposed_state, gradient, pairs.before, dC);
        coefficient_gradient(
            p, count, dS, x, B, [&](int64_t t) { return s.rest[t] * s.dt[t]; }, transposed_state, gradient, pairs.after,
            dB);
        pairs.both = 0;
        for (int64_t n = 0; n < p.states; ++n) pairs.both += dot(S + n * row, dS + n * row, row);
        pairs.both *= s.decay[count - 1];

        product(count, row, p.states, {B, states, 1}, dS, row, y, row, false);
        for (int64_t t = 0; t < count; ++t) scale(y + t * row, s.rest[t], row, y + t * row);
        product_triangle(count, row, true, matrix, kChunk, dy, row, y, row, true);

        double dexponent[kChunk];
        float ddt[kChunk];
        sum_pairs(pairs, count, dexponent);
        for (int64_t t = 0; t < count; ++t) {
          ddt[t] = float(dexponent[t] * p.A[head] + dot(x + t * row, y + t * row, row)) * s.slope[t];
          dA[i] += dexponent[t] * s.dt[t];
          dbias[i] += ddt[t];
        }
        if (p.ddt) store_dt(p, block.batch, head, c.begin, count, ddt);

        for (int64_t t = 0; t < count; ++t) {
          float *dx = y + t * row, *d = dy + t * row;
          for (int64_t j = 0; j < row; j += kLanes)
            store(dx + j, load(dx + j, Full{}) * s.dt[t] + load(D + j, Full{}) * load(d + j, Full{}), Full{});
          if (p.dx) store_row(dx, p.headdim, static_cast<T*>(p.dx) + at + t * step);
          scale(d, s.decay[t], row, weighted + t * row);
        }
        for (int64_t n = 0; n < p.states; ++n) scale(dS + n * row, s.decay[count - 1], row, dS + n * row);
        const int64_t end = count - 1;  // backwards, as the recurrence: what has decayed most comes first
        product(p.states, row, count, {C + end * states, 1, -states}, weighted + end * row, -row, dS, row, true);
      }
      if (c.first && p.dinitial_states) store_state_matrix(p, dS, p.dinitial_states + state_at(c, i));
    }
    if (count == 0) return;
    product_triangle(count, states, false, dproducts, kChunk, B, states, dC, states, true);
    product_triangle(count, states, true, dproducts, kChunk, C, states, dB, states, true);
    const int64_t at = (block.index * p.batch + block.batch) * p.steps + c.begin;
    for (int64_t t = 0; t < count; ++t) {
      const int64_t to = ((at + t) * p.groups + block.group) * p.states;
      if (p.dB) store_row(dB + t * states, p.states, p.dB + to);
      if (p.dC) store_row(dC + t * states, p.states, p.dC + to);
    }
  });

  const int64_t at = block.batch * p.heads + block.head;
  for (int64_t i = 0; i < block.heads; ++i) {
    if (p.dA) p.dA[at + i] = float(dA[i]);
    if (p.ddt_bias) p.ddt_bias[at + i] = float(dbias[i]);
    if (!p.dD) continue;
    double sum = 0;
    for (int64_t j = 0; j < p.headdim; ++j) {
      sum += dD[i * row + j];
      if (p.D_varies) p.dD[(at + i) * p.headdim + j] = float(dD[i * row + j]);
    }
    if (!p.D_varies) p.dD[at + i] = float(sum);
  }
}

}  // namespace

int64_t backward_scratch(const SsdScan& p) {
  const int64_t row = whole_tiles(p.headdim), states = whole_tiles(p.states);
  return (most_chunks(p) + 1) * p.block * p.states * row + p.headdim * states + 5 * kChunk * states +
         kChunk * (states > row ? states : row) + 4 * kChunk * kChunk + (5 * kChunk + 1 + 2 * p.block) * row +
         4 * p.block;
}

void backward(const SsdBackward& p, int64_t begin, int64_t end, float* scratch) {
  for (int64_t task = begin; task < end; ++task) switch (p.dtype) {
      case Dtype::kFloat32: backward_task<float>(p, task, {scratch}); break;
      case Dtype::kBFloat16: backward_task<bfloat16>(p, task, {scratch}); break;
      case Dtype::kFloat16: backward_task<float16>(p, task, {scratch}); break;
    }
}

}  // namespace DLOPS_ISA
}  // namespace dlops
