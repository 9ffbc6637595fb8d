// What the forward and the backward of Mamba-2's scan share. A head goes through time in chunks of Q <= kChunk steps,
// as matrix products (Dao and Gu, 2024, section 6). With cum[t] the sum of dt A from the chunk's first step to t, and
// the state S (states, headdim) before the chunk:
//   y[t] = exp(cum[t]) C[t] S + sum over s <= t of M[t][s] dt[s] x[s],    M[t][s] = (C[t] . B[s]) exp(cum[t] - cum[s])
//   S    = exp(cum[Q - 1]) S + sum over s of B[s]^T exp(cum[Q - 1] - cum[s]) dt[s] x[s]
// Matrices are rows of floats, padded to whole tiles.
#pragma once

#include "core/math.h"
#include "core/shuffle.h"
#include "cpu/lanes.h"
#include "cpu/ssd_scan.h"

namespace dlops {
inline namespace DLOPS_ISA {
namespace {

constexpr int64_t kChunk = 64;
constexpr int64_t kColumns = 2 * kLanes;  // of a tile of a product
constexpr int64_t kRows = 6;
constexpr int64_t kCausalRows = 2 * kRows;  // that share the length of their sums in a product with a triangle

DLOPS_HD int64_t whole_tiles(int64_t columns) { return (columns + kColumns - 1) / kColumns * kColumns; }

DLOPS_HD int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- matrices ------------------------------------------------------------------------------------------------------

struct Operand {  // element (i, k) of the left factor; its transpose swaps the strides
  const float* data;
  int64_t row, depth;
};

template <int kCount>
DLOPS_INLINE inline void product_tile(int64_t depth, Operand a, const float* b, int64_t b_row, float* out,
                                      int64_t out_row, bool add) {
  vfloat sum[kCount][2] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const vfloat low = load(b + k * b_row, Full{}), high = load(b + k * b_row + kLanes, Full{});
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      const vfloat factor = splat<vfloat>(a.data[i * a.row + k * a.depth]);
      sum[i][0] += factor * low;
      sum[i][1] += factor * high;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
    float* to = out + i * out_row;
    store(to, add ? load(to, Full{}) + sum[i][0] : sum[i][0], Full{});
    store(to + kLanes, add ? load(to + kLanes, Full{}) + sum[i][1] : sum[i][1], Full{});
  }
}

template <int kCount>
DLOPS_INLINE inline void product_rows(int64_t rows, int64_t depth, Operand a, const float* b, int64_t b_row, float* out,
                                      int64_t out_row, bool add) {
  if (rows == kCount)
    product_tile<kCount>(depth, a, b, b_row, out, out_row, add);
  else if constexpr (kCount > 1)
    product_rows<kCount - 1>(rows, depth, a, b, b_row, out, out_row, add);
}

// out = a b, or with `add` out + a b: (rows, depth) by (depth, columns). Sums are of short runs, which are added.
inline void product(int64_t rows, int64_t columns, int64_t depth, Operand a, const float* b, int64_t b_row, float* out,
                    int64_t out_row, bool add) {
  constexpr int64_t kRun = 32;
  for (int64_t c = 0; c < columns; c += kColumns) {
    int64_t k = 0;
    do {
      const int64_t run = least(depth - k, kRun);
      for (int64_t i = 0; i < rows; i += kRows)
        product_rows<kRows>(least(rows - i, kRows), run, {a.data + i * a.row + k * a.depth, a.row, a.depth},
                            b + k * b_row + c, b_row, out + i * out_row + c, out_row, add || k > 0);
      k += kRun;
    } while (k < depth);
  }
}

// The same for a square a that is zero above its diagonal, or of its transpose.
inline void product_triangle(int64_t size, int64_t columns, bool transposed, const float* a, int64_t a_row,
                             const float* b, int64_t b_row, float* out, int64_t out_row, bool add) {
  for (int64_t i = 0; i < size; i += kCausalRows) {
    const int64_t rows = least(size - i, kCausalRows);
    if (transposed)
      product(rows, columns, size - i, {a + i * a_row + i, 1, a_row}, b + i * b_row, b_row, out + i * out_row, out_row,
              add);
    else
      product(rows, columns, i + rows, {a + i * a_row, a_row, 1}, b, b_row, out + i * out_row, out_row, add);
  }
}

// (rows, columns) to (columns, rows).
inline void transpose_into(const float* in, int64_t in_row, int64_t rows, int64_t columns, float* out,
                           int64_t out_row) {
  for (int64_t i = 0; i < rows; i += kLanes)
    load_lanes(in + i * in_row, in_row, 1, int(least(rows - i, kLanes)), columns, out + i, out_row);
}

// out = factor in, one row.
DLOPS_HD void scale(const float* in, float factor, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += kLanes) store(out + i, load(in + i, Full{}) * factor, Full{});
}

// ---- loads and stores ----------------------------------------------------------------------------------------------

// Steps [begin, begin + count) of one head or group as (count, whole_tiles(width)), zero beyond width.
template <class T>
void load_chunk(const SsdTensor& x, int64_t batch, int64_t head, int64_t begin, int64_t count, int64_t width,
                float* out) {
  const int64_t row = whole_tiles(width);
  for (int64_t t = 0; t < count; ++t, out += row) {
    const T* p = static_cast<const T*>(x.data) + batch * x.batch + (begin + t) * x.step + head * x.head;
    for (int64_t i = 0; i < row; i += kLanes) {
      if (i + kLanes <= width && x.element == 1) {
        store(out + i, load(p + i, Full{}), Full{});
        continue;
      }
      for (int64_t j = i; j < i + kLanes; ++j) out[j] = j < width ? to_float(p[j * x.element]) : 0;
    }
  }
}

template <class T>
void store_row(const float* in, int64_t width, T* out) {
  for_lanes(width, [&](int64_t i, auto part) DLOPS_INLINE { store(out + i, load(in + i, Full{}), part); });
}

// (headdim, states) contiguous to S, (states, whole_tiles(headdim)), and back; a null source is zero.
inline void load_state_matrix(const SsdScan& p, const float* from, float* out) {
  const int64_t row = whole_tiles(p.headdim);
  __builtin_memset(out, 0, p.states * row * sizeof(float));
  if (from) transpose_into(from, p.states, p.headdim, p.states, out, row);
}

inline void store_state_matrix(const SsdScan& p, const float* in, float* to) {
  for (int64_t i = 0; i < p.headdim; i += kLanes)
    store_lanes(to + i * p.states, p.states, 1, int(least(p.headdim - i, kLanes)), p.states, in + i,
                whole_tiles(p.headdim));
}

// ---- a chunk -------------------------------------------------------------------------------------------------------

// Per step of a chunk. cum = cum_high + cum_low.
struct Steps {
  float dt[kChunk], slope[kChunk], cum_high[kChunk], cum_low[kChunk];
  float decay[kChunk];  // exp(cum[t]): from before the chunk to t
  float rest[kChunk];   // exp(cum[Q - 1] - cum[t]): from t to after the chunk
};

template <class T>
void load_dt(const SsdScan& p, int64_t batch, int64_t head, int64_t begin, int64_t count, float* out) {
  const T* dt = static_cast<const T*>(p.dt.data) + batch * p.dt.batch + begin * p.dt.step + head * p.dt.head;
  for (int64_t t = 0; t < count; ++t) out[t] = to_float(dt[t * p.dt.step]);
}

// exp of the difference of two sums in two parts each, of which the first is the larger. The difference is exact too:
// one rounding of it would be several of its exponential.
DLOPS_HD vfloat decay_between(vfloat high, vfloat low, vfloat from_high, vfloat from_low) {
  const vfloat difference = high - from_high;
  const vfloat rest = (low - from_low) - (from_high + (difference - high));
  const vfloat decay = exp(difference);
  return decay * rest + decay;
}

inline void load_steps(const SsdScan& p, int64_t batch, int64_t head, int64_t begin, int64_t count, Steps& s) {
  constexpr float kNone = -128;  // what decays by more is zero in float; its sum with others stays exact
  __builtin_memset(s.dt, 0, sizeof(s.dt));
  switch (p.dt_dtype) {
    case Dtype::kFloat32: load_dt<float>(p, batch, head, begin, count, s.dt); break;
    case Dtype::kBFloat16: load_dt<bfloat16>(p, batch, head, begin, count, s.dt); break;
    case Dtype::kFloat16: load_dt<float16>(p, batch, head, begin, count, s.dt); break;
  }
  const float bias = p.dt_bias ? p.dt_bias[head] : 0;
  for (int64_t t = 0; t < kChunk; t += kLanes) {
    const vfloat raw = load(s.dt + t, Full{}) + bias;
    const vfloat dt = p.dt_softplus ? softplus(raw) : raw;
    const vfloat slope = p.dt_softplus ? sigmoid(raw) : splat<vfloat>(1);
    store(s.dt + t, minimum(maximum(dt, p.dt_min), p.dt_max), Full{});
    store(s.slope + t, vselect((dt < p.dt_min) | (dt > p.dt_max), vfloat{}, slope), Full{});
  }
  double cum = 0;
  for (int64_t t = 0; t < count; ++t) {
    const double exponent = double(s.dt[t]) * p.A[head];
    cum += exponent < kNone ? kNone : exponent;
    s.cum_high[t] = float(cum);
    s.cum_low[t] = float(cum - s.cum_high[t]);
  }
  for (int64_t t = count; t < kChunk; ++t) s.cum_high[t] = s.cum_low[t] = 0;
  const vfloat end_high = splat<vfloat>(s.cum_high[count - 1]), end_low = splat<vfloat>(s.cum_low[count - 1]);
  for (int64_t t = 0; t < kChunk; t += kLanes) {
    const vfloat high = load(s.cum_high + t, Full{}), low = load(s.cum_low + t, Full{});
    store(s.decay + t, decay_between(high, low, vfloat{}, vfloat{}), Full{});
    store(s.rest + t, decay_between(end_high, end_low, high, low), Full{});
  }
}

// f(s, exp(cum[t] - cum[s]), s <= t) for all vectors of s of a chunk.
template <class F>
DLOPS_HD void for_decays(const Steps& s, int64_t t, F f) {
  vint lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  const vfloat high = splat<vfloat>(s.cum_high[t]), low = splat<vfloat>(s.cum_low[t]);
  for (int64_t i = 0; i < kChunk; i += kLanes) {
    if (i > t) {
      f(i, vfloat{}, vint{});
      continue;
    }
    const vfloat decay = decay_between(high, low, load(s.cum_high + i, Full{}), load(s.cum_low + i, Full{}));
    f(i, decay, lane + int32_t(i) <= int32_t(t));
  }
}

// out[t][s] = a[t] . b[s] for s <= t, kChunk floats per row; transposed is scratch (width, kChunk).
inline void inner_products(const float* a, const float* b, int64_t count, int64_t width, float* transposed,
                           float* out) {
  const int64_t row = whole_tiles(width);
  transpose_into(b, row, count, width, transposed, kChunk);
  for (int64_t t = 0; t < count; t += kCausalRows) {
    const int64_t rows = least(count - t, kCausalRows);
    product(rows, whole_tiles(t + rows), width, {a + t * row, row, 1}, transposed, kChunk, out + t * kChunk, kChunk,
            false);
  }
}

// S after the chunk from S before it; weighted is scratch for (count, whole_tiles(headdim)).
inline void advance_state(const SsdScan& p, const Steps& s, int64_t count, const float* B, const float* x,
                          float* weighted, float* state) {
  const int64_t row = whole_tiles(p.headdim), states = whole_tiles(p.states);
  for (int64_t t = 0; t < count; ++t) scale(x + t * row, s.rest[t] * s.dt[t], row, weighted + t * row);
  for (int64_t n = 0; n < p.states; ++n) scale(state + n * row, s.decay[count - 1], row, state + n * row);
  product(p.states, row, count, {B, 1, states}, weighted, row, state, row, true);
}

// y before the gate; matrix is scratch (kChunk, kChunk).
inline void chunk_output(const SsdScan& p, const Steps& s, int64_t count, const float* C, const float* x,
                         const float* D, const float* products, const float* state, float* matrix, float* y) {
  const int64_t row = whole_tiles(p.headdim), states = whole_tiles(p.states);
  product(count, row, p.states, {C, states, 1}, state, row, y, row, false);
  for (int64_t t = 0; t < count; ++t) {
    scale(y + t * row, s.decay[t], row, y + t * row);
    for_decays(s, t, [&](int64_t i, vfloat decay, vint seen) DLOPS_INLINE {
      const vfloat m = load(products + t * kChunk + i, Full{}) * decay * load(s.dt + i, Full{});
      store(matrix + t * kChunk + i, vselect(seen, m, vfloat{}), Full{});
    });
  }
  product_triangle(count, row, false, matrix, kChunk, x, row, y, row, true);
  for (int64_t t = 0; t < count; ++t)
    for (int64_t i = t * row; i < (t + 1) * row; i += kLanes)
      store(y + i, load(y + i, Full{}) + load(D + i - t * row, Full{}) * load(x + i, Full{}), Full{});
}

// D of a head as a row, zero where it is absent.
inline void load_skip(const SsdScan& p, int64_t head, float* out) {
  for (int64_t i = 0; i < whole_tiles(p.headdim); ++i)
    out[i] = !p.D || i >= p.headdim ? 0 : p.D_varies ? p.D[head * p.headdim + i] : p.D[head];
}

// ---- tasks ---------------------------------------------------------------------------------------------------------

// The heads [head, head + heads) of one batch element, all of one group.
struct Heads {
  int64_t index, batch, group, head, heads;
  Heads(const SsdScan& p, int64_t task) {
    const int64_t width = p.heads / p.groups;
    index = task % p.blocks();
    group = task / p.blocks() % p.groups;
    batch = task / p.blocks() / p.groups;
    head = group * width + index * p.block;
    heads = least(width - index * p.block, p.block);
  }
};

struct Chunk {
  int64_t sequence, begin, end;
  bool first, last;  // of its sequence
};

// f(chunk) over the batch element's sequences in order, or backwards; an empty sequence has one empty chunk.
template <class F>
void for_chunks(const SsdScan& p, int64_t batch, bool backwards, F f) {
  const int64_t sequences = p.cu_seqlens ? p.sequences : 1;
  for (int64_t i = 0; i < sequences; ++i) {
    const int64_t s = backwards ? sequences - 1 - i : i;
    const int64_t begin = p.cu_seqlens ? p.cu_seqlens[s] : 0, end = p.cu_seqlens ? p.cu_seqlens[s + 1] : p.steps;
    const int64_t count = end > begin ? (end - begin + kChunk - 1) / kChunk : 1;
    for (int64_t j = 0; j < count; ++j) {
      const int64_t k = begin + (backwards ? count - 1 - j : j) * kChunk;
      f(Chunk{p.cu_seqlens ? s : batch, k, least(k + kChunk, end), k == begin, k + kChunk >= end});
    }
  }
}

}  // namespace
}  // namespace DLOPS_ISA
}  // namespace dlops
