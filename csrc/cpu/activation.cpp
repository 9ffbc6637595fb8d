// Elementwise passes on the host. M rows, N columns; a task is block_rows rows of kColumns columns, so that a chunk of
// a row stays in the first-level cache between converting to float, computing, and rounding once at the store.
#include "cpu/activation.h"

#include "core/simd.h"

namespace dlops {
inline namespace DLOPS_ISA {
namespace {

constexpr int64_t kColumns = kActivationColumns;
constexpr int64_t kRunRows = 32;  // rows added one after the other before their sum joins the block's

#define DLOPS_INLINE __attribute__((always_inline))

template <bool kStream>
DLOPS_INLINE inline void put(float* p, vfloat v, auto lanes) {
  if constexpr (kStream)
    stream(p, v, lanes);
  else
    store(p, v, lanes);
}

template <class A, bool kStream>
void value_chunk(const float* params, const float* x, float* y, int64_t n) {
  const A activation(params);
  for_lanes(
      n, [&](int64_t j, auto lanes) DLOPS_INLINE { put<kStream>(y + j, activation.value(load(x + j, lanes)), lanes); });
}

template <class A, bool kStream>
void gradient_chunk(const float* params, const float* dy, const float* saved, float* dx, int64_t n) {
  const A activation(params);
  for_lanes(n, [&](int64_t j, auto lanes) DLOPS_INLINE {
    put<kStream>(dx + j, gradient(activation, load(dy + j, lanes), load(saved + j, lanes)), lanes);
  });
}

// The activation on a chunk of floats; [1] writes its result past the caches.
struct Chunks {
  bool from_output;
  void (*value[2])(const float* params, const float* x, float* y, int64_t n);
  void (*gradient[2])(const float* params, const float* dy, const float* saved, float* dx, int64_t n);
};

template <class A>
constexpr Chunks kChunksOf = {
    A::kFromOutput, {value_chunk<A, false>, value_chunk<A, true>}, {gradient_chunk<A, false>, gradient_chunk<A, true>}};

// In the order of Activation.
constexpr Chunks kChunks[] = {kChunksOf<None>,      kChunksOf<Step>,     kChunksOf<Sign>,    kChunksOf<Relu>,
                              kChunksOf<LeakyRelu>, kChunksOf<Elu>,      kChunksOf<Sigmoid>, kChunksOf<Tanh>,
                              kChunksOf<Gelu>,      kChunksOf<GeluTanh>, kChunksOf<Silu>,    kChunksOf<Relu2>,
                              kChunksOf<Hardswish>, kChunksOf<Mish>,     kChunksOf<Softplus>};

void multiply(const float* a, const float* b, float* out, int64_t n) {
  for_lanes(
      n, [&](int64_t j, auto lanes) DLOPS_INLINE { store(out + j, load(a + j, lanes) * load(b + j, lanes), lanes); });
}

// n elements as floats: in place, or converted into buffer.
const float* read(const float* x, float*, int64_t) { return x; }

template <class T>
const float* read(const T* x, float* buffer, int64_t n) {
  for_lanes(n, [&](int64_t j, auto lanes) DLOPS_INLINE { store(buffer + j, load(x + j, lanes), lanes); });
  return buffer;
}

template <class T>
void write(T* y, const float* buffer, int64_t n, bool streaming) {
  if (streaming && can_stream(y, 0))
    for_lanes(n, [&](int64_t j, auto lanes) DLOPS_INLINE { stream(y + j, load(buffer + j, lanes), lanes); });
  else
    for_lanes(n, [&](int64_t j, auto lanes) DLOPS_INLINE { store(y + j, load(buffer + j, lanes), lanes); });
}

// Sums of one column chunk over the rows of a block.
struct BiasSum {
  float run[kColumns], total[kColumns];

  void clear() {
    __builtin_memset(run, 0, sizeof(run));
    __builtin_memset(total, 0, sizeof(total));
  }
  void flush() {
    for (int64_t j = 0; j < kColumns; ++j) total[j] += run[j];
    __builtin_memset(run, 0, sizeof(run));
  }
  void add(const float* x, int64_t n) {
    for_lanes(n, [&](int64_t j, auto lanes)
                     DLOPS_INLINE { store(run + j, load(run + j, lanes) + load(x + j, lanes), lanes); });
  }
};

struct Segment {
  int64_t block, row, column, count;
};

// Calls begin(segment) before, body(segment) on and end(segment) after the rows of every task; flush every kRunRows.
template <class Begin, class Body, class Flush, class End>
void for_segments(const ActivationPass& p, int64_t begin_task, int64_t end_task, Begin begin, Body body, Flush flush,
                  End end) {
  const int64_t chunks = (p.width + kColumns - 1) / kColumns;
  for (int64_t task = begin_task; task < end_task; ++task) {
    const int64_t block = task / chunks, column = task % chunks * kColumns;
    const int64_t count = p.width - column < kColumns ? p.width - column : kColumns;
    const int64_t first = block * p.block_rows;
    const int64_t last = first + p.block_rows < p.rows ? first + p.block_rows : p.rows;
    begin();
    for (int64_t row = first; row < last; ++row) {
      body(Segment{block, row, column, count});
      if (row + 1 == last || (row + 1 - first) % kRunRows == 0) flush();
    }
    end(Segment{block, first, column, count});
  }
  if (p.stream) stream_fence();
}

constexpr auto kNothing = [](auto&&...) {};

template <class T>
const T* at(const void* base, int64_t stride, const Segment& s) {
  return static_cast<const T*>(base) + s.row * stride + s.column;
}

template <class T>
T* at_output(void* base, const ActivationPass& p, const Segment& s) {
  return static_cast<T*>(base) + s.row * p.width + s.column;
}

// Where a chunk is computed: the output itself when it holds floats, else the buffer that write() then rounds.
float* target(float* y, float*) { return y; }

template <class T>
float* target(T*, float* buffer) {
  return buffer;
}

template <class T>
void act_typed(const ActivationPass& p, int64_t begin, int64_t end) {
  const Chunks chunk = kChunks[int(p.activation)];
  alignas(64) float x_buffer[kColumns], y_buffer[kColumns];
  for_segments(
      p, begin, end, kNothing,
      [&](const Segment& s) {
        T* out = at_output<T>(p.out, p, s);
        float* y = target(out, y_buffer);
        const float* x = read(at<T>(p.x, p.x_stride, s), x_buffer, s.count);
        chunk.value[y != y_buffer && p.stream && can_stream(out, 0)](p.params, x, y, s.count);
        if (y == y_buffer) write(out, y, s.count, p.stream);
      },
      kNothing, kNothing);
}

template <class T>
void act_backward_typed(const ActivationPass& p, int64_t begin, int64_t end) {
  const Chunks chunk = kChunks[int(p.activation)];
  alignas(64) float x_buffer[kColumns], dy_buffer[kColumns], dx_buffer[kColumns];
  BiasSum bias;
  for_segments(
      p, begin, end,
      [&] {
        if (p.dbias) bias.clear();
      },
      [&](const Segment& s) {
        const float* x = read(at<T>(p.x, p.x_stride, s), x_buffer, s.count);
        const float* dy = read(at<T>(p.dy, p.dy_stride, s), dy_buffer, s.count);
        T* out = at_output<T>(p.out, p, s);
        float* dx = p.dbias ? dx_buffer : target(out, dx_buffer);  // the bias gradient sums what is not yet rounded
        chunk.gradient[dx != dx_buffer && p.stream && can_stream(out, 0)](p.params, dy, x, dx, s.count);
        if (dx == dx_buffer) write(out, dx, s.count, p.stream);
        if (p.dbias) bias.add(dx, s.count);
      },
      [&] {
        if (p.dbias) bias.flush();
      },
      [&](const Segment& s) {
        if (p.dbias) write(p.dbias + s.block * p.width + s.column, bias.total, s.count, false);
      });
}

template <class T>
void gate_typed(const ActivationPass& p, int64_t begin, int64_t end) {
  const Chunks chunk = kChunks[int(p.activation)];
  alignas(64) float x_buffer[kColumns], up_buffer[kColumns], y[kColumns];
  for_segments(
      p, begin, end, kNothing,
      [&](const Segment& s) {
        const float* x = read(at<T>(p.x, p.x_stride, s), x_buffer, s.count);
        const float* up = read(at<T>(p.up, p.up_stride, s), up_buffer, s.count);
        chunk.value[0](p.params, x, y, s.count);
        multiply(y, up, y, s.count);
        write(at_output<T>(p.out, p, s), y, s.count, p.stream);
      },
      kNothing, kNothing);
}

template <class T>
void gate_backward_typed(const ActivationPass& p, int64_t begin, int64_t end) {
  const Chunks chunk = kChunks[int(p.activation)];
  alignas(64) float x_buffer[kColumns], up_buffer[kColumns], dy_buffer[kColumns], y[kColumns], dx[kColumns];
  BiasSum bias, bias_up;
  for_segments(
      p, begin, end,
      [&] {
        if (p.dbias) bias.clear();
        if (p.dbias_up) bias_up.clear();
      },
      [&](const Segment& s) {
        const float* x = read(at<T>(p.x, p.x_stride, s), x_buffer, s.count);
        const float* up = read(at<T>(p.up, p.up_stride, s), up_buffer, s.count);
        const float* dy = read(at<T>(p.dy, p.dy_stride, s), dy_buffer, s.count);
        chunk.value[0](p.params, x, y, s.count);
        multiply(dy, up, dx, s.count);
        chunk.gradient[0](p.params, dx, chunk.from_output ? y : x, dx, s.count);
        multiply(dy, y, y, s.count);
        write(at_output<T>(p.out, p, s), dx, s.count, p.stream);
        write(at_output<T>(p.out_up, p, s), y, s.count, p.stream);
        if (p.dbias) bias.add(dx, s.count);
        if (p.dbias_up) bias_up.add(y, s.count);
      },
      [&] {
        if (p.dbias) bias.flush();
        if (p.dbias_up) bias_up.flush();
      },
      [&](const Segment& s) {
        const int64_t offset = s.block * p.width + s.column;
        if (p.dbias) write(p.dbias + offset, bias.total, s.count, false);
        if (p.dbias_up) write(p.dbias_up + offset, bias_up.total, s.count, false);
      });
}

// The first largest piece, or the first NaN.
// One row; kPieces is the number of pieces where the compiler shall know it, else 0. The value that wins is carried as
// its own type: a float would need rounding back.
template <class T, int kPieces>
void maxout_row(const T* x, T* y, int64_t* index, int64_t width, int64_t num_pieces) {
  const int64_t pieces = kPieces ? kPieces : num_pieces;
#pragma omp simd
  for (int64_t j = 0; j < width; ++j) {
    T winner = x[j * pieces];
    float best = to_float(winner);
    int64_t best_piece = 0;
    for (int64_t piece = 1; piece < pieces; ++piece) {
      const T value = x[j * pieces + piece];
      const float candidate = to_float(value);
      const bool better = (candidate > best) | ((candidate != candidate) & (best == best));
      winner = better ? value : winner;
      best = better ? candidate : best;
      best_piece = better ? piece : best_piece;
    }
    y[j] = winner;
    index[j] = best_piece;
  }
}

template <class T>
void maxout_typed(const MaxoutPass& p, int64_t begin, int64_t end) {
  const auto run = p.num_pieces == 2 ? maxout_row<T, 2> : p.num_pieces == 4 ? maxout_row<T, 4> : maxout_row<T, 0>;
  for (int64_t row = begin; row < end; ++row)
    run(static_cast<const T*>(p.x) + row * p.x_stride, static_cast<T*>(p.y) + row * p.width, p.index + row * p.width,
        p.width, p.num_pieces);
}

#define DLOPS_BY_DTYPE(function, Params)                                       \
  void function(const Params& p, int64_t begin, int64_t end) {                 \
    switch (p.dtype) {                                                         \
      case Dtype::kFloat32: return function##_typed<float>(p, begin, end);     \
      case Dtype::kBFloat16: return function##_typed<bfloat16>(p, begin, end); \
      case Dtype::kFloat16: return function##_typed<float16>(p, begin, end);   \
    }                                                                          \
  }
DLOPS_BY_DTYPE(act, ActivationPass)
DLOPS_BY_DTYPE(act_backward, ActivationPass)
DLOPS_BY_DTYPE(gate, ActivationPass)
DLOPS_BY_DTYPE(gate_backward, ActivationPass)
DLOPS_BY_DTYPE(maxout, MaxoutPass)
#undef DLOPS_BY_DTYPE

}  // namespace

const ActivationKernels activation_kernels = {act, act_backward, gate, gate_backward, maxout};

}  // namespace DLOPS_ISA
}  // namespace dlops
