// Mamba-2's scan on the host, forward. A task is a block of heads of one batch element, all of one group; they go
// through time chunk by chunk, so that the inner products of C and B are formed once for all of them.
#include "cpu/ssd_tile.h"

namespace dlops {
inline namespace DLOPS_ISA {

int64_t backward_scratch(const SsdScan& p);
void backward(const SsdBackward& p, int64_t begin, int64_t end, float* scratch);

namespace {

int64_t forward_scratch(const SsdScan& p) {
  const int64_t row = whole_tiles(p.headdim), states = whole_tiles(p.states);
  return p.block * p.states * row + 3 * kChunk * states + 2 * kChunk * kChunk + (4 * kChunk + 1) * row;
}

template <class T>
void forward_task(const SsdForward& p, int64_t task, Scratch scratch) {
  const Heads block(p, task);
  const int64_t row = whole_tiles(p.headdim), states = whole_tiles(p.states), size = p.states * row;
  float* state = scratch.take(block.heads * size);
  float* B = scratch.take(kChunk * states);
  float* C = scratch.take(kChunk * states);
  float* transposed = scratch.take(kChunk * states);
  float* products = scratch.take(kChunk * kChunk);
  float* matrix = scratch.take(kChunk * kChunk);
  float* x = scratch.take(kChunk * row);
  float* y = scratch.take(kChunk * row);
  float* z = scratch.take(kChunk * row);
  float* weighted = scratch.take(kChunk * row);
  float* D = scratch.take(row);
  for_chunks(p, block.batch, false, [&](Chunk c) DLOPS_INLINE {
    const int64_t count = c.end - c.begin;
    if (count) {
      load_chunk<T>(p.B, block.batch, block.group, c.begin, count, p.states, B);
      load_chunk<T>(p.C, block.batch, block.group, c.begin, count, p.states, C);
      inner_products(C, B, count, p.states, transposed, products);
    }
    for (int64_t i = 0; i < block.heads; ++i) {
      const int64_t head = block.head + i, at = (c.sequence * p.heads + head) * p.headdim * p.states;
      float* S = state + i * size;
      if (c.first) load_state_matrix(p, p.initial_states ? p.initial_states + at : nullptr, S);
      if (count) {
        Steps s;
        load_steps(p, block.batch, head, c.begin, count, s);
        load_chunk<T>(p.x, block.batch, head, c.begin, count, p.headdim, x);
        load_skip(p, head, D);
        chunk_output(p, s, count, C, x, D, products, S, matrix, y);
        if (p.z.data) {
          load_chunk<T>(p.z, block.batch, head, c.begin, count, p.headdim, z);
          for (int64_t j = 0; j < count * row; j += kLanes) {
            const vfloat gate = load(z + j, Full{});
            store(y + j, load(y + j, Full{}) * (gate * sigmoid(gate)), Full{});
          }
        }
        T* out = static_cast<T*>(p.y) + ((block.batch * p.steps + c.begin) * p.heads + head) * p.headdim;
        for (int64_t t = 0; t < count; ++t) store_row(y + t * row, p.headdim, out + t * p.heads * p.headdim);
        advance_state(p, s, count, B, x, weighted, S);
      }
      if (c.last) store_state_matrix(p, S, p.final_states + at);
    }
  });
}

void forward(const SsdForward& p, int64_t begin, int64_t end, float* scratch) {
  for (int64_t task = begin; task < end; ++task) switch (p.dtype) {
      case Dtype::kFloat32: forward_task<float>(p, task, {scratch}); break;
      case Dtype::kBFloat16: forward_task<bfloat16>(p, task, {scratch}); break;
      case Dtype::kFloat16: forward_task<float16>(p, task, {scratch}); break;
    }
}

}  // namespace

const SsdKernels ssd_kernels = {forward_scratch, backward_scratch, forward, backward};

}  // namespace DLOPS_ISA
}  // namespace dlops
