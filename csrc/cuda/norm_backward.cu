// Gradients of the root-mean-square and layer norm. M rows, D width; a block takes block_rows rows, a group of
// blockDim.x threads one of them at a time. With xhat = (x - mean) * rstd and g = dy * weight:
// dx = rstd * (g - xhat * mean(g * xhat) - mean(g)), the last term only with a mean; dweight and dbias are the sums of
// dy * xhat and dy over the block's rows, which column_sum adds up. The stored mean is rounded; what that left in xhat
// is its own mean, and is taken out again.
#include "cuda/launcher.h"
#include "cuda/norm.h"
#include "cuda/row.h"
#include "cuda/table.h"

namespace dlops::cuda {
namespace {

// Elements of a chunk in each thread; the first chunk stays in registers, with its weight gradients.
template <bool kWhole>
constexpr int kElements = kWhole ? 16 : 8;

// What a row contributes to its gradients, besides its elements.
struct RowTerms {
  float mean, rstd;
  float offset;    // the mean of xhat before it is taken out
  float slope;     // mean(g * xhat)
  float constant;  // mean(g)
};

template <bool kLayer>
__device__ __forceinline__ float normalised(const RowTerms& row, float x) {
  return (kLayer ? x - row.mean : x) * row.rstd;
}

// A thread's part of a chunk of dy and x.
template <class T, int kVec, int kItems>
struct Slice {
  Chunk<kVec, kItems> chunk;
  Pack<T, kVec> dy[kItems], x[kItems];

  __device__ __forceinline__ Slice(int64_t begin, int64_t end, const T* dy_row, const T* x_row) : chunk(begin, end) {
    dy_row += chunk.first;
    x_row += chunk.first;
    chunk.each([&](int item, int j) {
      dy[item] = load_pack<kVec>(dy_row + j);
      x[item] = load_pack<kVec>(x_row + j);
    });
  }

  // Adds to the sums over the row of g * xhat and, with a mean, of g and of xhat.
  template <int kSums>
  __device__ __forceinline__ void accumulate(const NormBackward& p, const RowTerms& row, float (&sums)[kSums]) const {
    chunk.each([&](int item, int j) {
      const auto w = load_pack_or<kVec>(static_cast<const T*>(p.weight), chunk.first + j, 1.0f);
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        const float g = dy[item].get(i) * w.get(i), v = normalised<kSums == 3>(row, x[item].get(i));
        sums[0] += g * v;
        if constexpr (kSums == 3) {
          sums[1] += g;
          sums[2] += v;
        }
      }
    });
  }

  // Writes dx of row `index`; add(item, offset + i, i, dy * xhat, dy) gets what each element adds to the weight
  // gradients.
  template <bool kLayer, class Add>
  __device__ __forceinline__ void gradients(const NormBackward& p, int64_t index, const RowTerms& row, Add add) const {
    const T* dsum = p.dsum ? static_cast<const T*>(p.dsum) + index * p.dsum_stride : nullptr;
    T* dx = p.dx ? static_cast<T*>(p.dx) + index * p.width + chunk.first : nullptr;
    chunk.each([&](int item, int j) {
      const auto w = load_pack_or<kVec>(static_cast<const T*>(p.weight), chunk.first + j, 1.0f);
      const auto s = load_pack_or<kVec>(dsum, chunk.first + j, -0.0f);
      float out[kVec];
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        const float d = dy[item].get(i), v = normalised<kLayer>(row, x[item].get(i)) - row.offset;
        add(item, j + i, i, d * v, d);
        // Unfused: g and the product cancel when they are equal, as they nearly are in very short rows.
        out[i] = (__fmul_rn(d, w.get(i)) - row.constant - __fmul_rn(v, row.slope)) * row.rstd + s.get(i);
      }
      if (dx) store_global(dx + j, Pack<T, kVec>::of(out));
    });
  }
};

// Where weight gradients beyond the first chunk are summed, and whether the row beyond it waits in shared memory too.
struct Beyond {
  bool shared_sums, shared_row;
};

// kWhole: rows are no longer than a chunk.
template <class T, int kVec, bool kLayer, bool kWhole>
__global__ void __launch_bounds__(kNormThreads, 1) backward_kernel(NormBackward p, Beyond beyond) {
  constexpr int kItems = kElements<kWhole> / kVec;
  using Part = Slice<T, kVec, kItems>;
  using Columns = Chunk<kVec, kItems>;
  DLOPS_SHARED(float, scratch, [kLayer ? 3 : 1][kMaxWarps]);
  DLOPS_DYNAMIC_SHARED(float, shared);
  const int64_t step = Columns::columns();
  float* const partial_dweight = p.dweight ? p.dweight + int64_t(blockIdx.x) * p.width : nullptr;
  float* const partial_dbias = p.dbias ? p.dbias + int64_t(blockIdx.x) * p.width : nullptr;

  // Beyond the first chunk: the sums, and in shared memory dy and x of a row.
  float* dweight_more = p.dweight ? partial_dweight + step : nullptr;
  float* dbias_more = p.dbias ? partial_dbias + step : nullptr;
  float* unused = shared;
  if (beyond.shared_sums) {
    if (p.dweight) dweight_more = unused, unused += p.width - step;
    if (p.dbias) dbias_more = unused, unused += p.width - step;
  }
  T* const dy_more = reinterpret_cast<T*>(unused);
  T* const x_more = dy_more + (p.width - step);
  // Calls f(column - step) for this thread's columns beyond the first chunk.
  const auto each_column = [&](auto f) {
    for (int64_t begin = step; begin < p.width; begin += step) {
      const Columns chunk(begin, p.width);
      chunk.each([&](int, int j) {
        for (int i = 0; i < kVec; ++i) f(chunk.first - step + j + i);
      });
    }
  };
  float dweight[kItems][kVec] = {}, dbias[kItems][kVec] = {};
  if constexpr (!kWhole)
    each_column([&](int64_t j) {
      if (p.dweight) dweight_more[j] = 0;
      if (p.dbias) dbias_more[j] = 0;
    });

  const int64_t block_begin = int64_t(blockIdx.x) * p.block_rows;
  const int64_t block_end = block_begin + p.block_rows < p.rows ? block_begin + p.block_rows : p.rows;
#pragma unroll 1
  for (int64_t base = block_begin; base < block_end; base += blockDim.y) {
    const int64_t index = base + threadIdx.y;
    const bool exists = index < block_end;  // a row past the last still takes part in the block's sums
    const int64_t end = exists ? p.width : 0;
    const T* dy_row = static_cast<const T*>(p.dy) + index * p.dy_stride;
    const T* x_row = static_cast<const T*>(p.x) + index * p.x_stride;
    RowTerms row{kLayer && exists ? p.mean[index] : 0.0f, exists ? p.rstd[index] : 0.0f, 0, 0, 0};
    const Part first(0, end, dy_row, x_row);
    float sums[kLayer ? 3 : 1] = {};
    first.accumulate(p, row, sums);
    if constexpr (!kWhole) {
#pragma unroll 1
      for (int64_t begin = step; begin < p.width; begin += step) {
        const Part more(begin, end, dy_row, x_row);
        more.accumulate(p, row, sums);
        if (!beyond.shared_row) continue;
        const int64_t at = more.chunk.first - step;
        more.chunk.each([&](int item, int j) {
          store_pack(dy_more + at + j, more.dy[item]);
          store_pack(x_more + at + j, more.x[item]);
        });
      }
    }
    row_sums(sums, scratch);
    const float n = float(p.width);
    if constexpr (kLayer) {
      row.offset = sums[2] / n;
      row.slope = (sums[0] - row.offset * sums[1]) / n;
      row.constant = sums[1] / n;
    } else {
      row.slope = sums[0] / n;
    }
    first.template gradients<kLayer>(p, index, row, [&](int item, int, int i, float dweight_term, float dbias_term) {
      dweight[item][i] += dweight_term;
      if constexpr (kLayer) dbias[item][i] += dbias_term;
    });
    if constexpr (!kWhole) {
      if (beyond.shared_row) dy_row = dy_more - step, x_row = x_more - step;
#pragma unroll 1
      for (int64_t begin = step; begin < p.width; begin += step) {
        const Part more(begin, end, dy_row, x_row);
        const int64_t at = more.chunk.first - step;
        more.template gradients<kLayer>(p, index, row, [&](int, int j, int, float dweight_term, float dbias_term) {
          if (p.dweight) dweight_more[at + j] += dweight_term;
          if (p.dbias) dbias_more[at + j] += dbias_term;
        });
      }
    }
  }

  // The block's row of partial sums.
  const Columns chunk(0, p.width);
  const auto write = [&](const float (&sum)[kItems][kVec], float* out) {
    if (blockDim.y > 1) __syncthreads();  // the last call's readers are done
    float* to = (blockDim.y > 1 ? shared + threadIdx.y * p.width : out) + chunk.first;
    chunk.each([&](int item, int j) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) to[j + i] = sum[item][i];
    });
    if (blockDim.y == 1) return;
    __syncthreads();
    for (int64_t j = threadIdx.y * blockDim.x + threadIdx.x; j < p.width; j += blockDim.x * blockDim.y) {
      float total = 0;
      for (unsigned y = 0; y < blockDim.y; ++y) total += shared[y * p.width + j];
      out[j] = total;
    }
  };
  if (p.dweight) write(dweight, partial_dweight);
  if (kLayer && p.dbias) write(dbias, partial_dbias);
  if constexpr (!kWhole)
    if (beyond.shared_sums)
      each_column([&](int64_t j) {
        if (p.dweight) partial_dweight[step + j] = dweight_more[j];
        if (p.dbias) partial_dbias[step + j] = dbias_more[j];
      });
}

template <class T>
bool all_aligned(const NormBackward& p) {
  const int64_t size = sizeof(T);
  return aligned(p.dy, p.dy_stride * size) && aligned(p.x, p.x_stride * size) && aligned(p.weight) &&
         aligned(p.dsum, p.dsum_stride * size) && aligned(p.dx, p.width * size) && p.width * size % 16 == 0;
}

template <class T, int kVec, bool kLayer>
const char* launch(const NormBackward& p, cudaStream_t stream) {
  const RowLayout layout = layout_for<kVec>(kNormBackward, p.width, kElements<true>);
  const bool whole = p.width <= int64_t(layout.threads) * kElements<true>;
  const int sums = (p.dweight != nullptr) + (p.dbias != nullptr);
  int64_t shared = layout.rows > 1 && sums ? layout.rows * p.width * int64_t(sizeof(float)) : 0;
  Beyond beyond{};
  if (!whole) {
    const int64_t rest = p.width - int64_t(layout.threads) * kElements<false>;
    const int64_t limit = shared_limit(kNormStatic);
    const int64_t sum_bytes = sums * rest * int64_t(sizeof(float)), row_bytes = 2 * rest * int64_t(sizeof(T));
    beyond.shared_sums = sum_bytes <= limit;
    shared = beyond.shared_sums ? sum_bytes : 0;
    beyond.shared_row = shared + row_bytes <= limit;
    shared += beyond.shared_row ? row_bytes : 0;
  }
  const auto kernel = whole ? backward_kernel<T, kVec, kLayer, true> : backward_kernel<T, kVec, kLayer, false>;
  if (const char* error = allow_shared(kernel, shared, kNormStatic)) return error;
  DLOPS_LAUNCH(kernel, dim3(unsigned(ceil_div(p.rows, p.block_rows))), dim3(layout.threads, layout.rows),
               size_t(shared), stream, p, beyond);
  return launch_error();
}

}  // namespace

const char* norm_backward(const NormBackward& p, void* stream) {
  if (p.rows == 0 || p.width == 0) return nullptr;
  return with_dtype(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto s = static_cast<cudaStream_t>(stream);
    const bool wide = all_aligned<T>(p);
    if (p.mean) return wide ? launch<T, kFullVec<T>, true>(p, s) : launch<T, 1, true>(p, s);
    return wide ? launch<T, kFullVec<T>, false>(p, s) : launch<T, 1, false>(p, s);
  });
}

int64_t norm_backward_block_rows(const NormBackward& p) {
  const RowLayout layout = with_dtype(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return all_aligned<T>(p) ? layout_for<kFullVec<T>>(kNormBackward, p.width, kElements<true>)
                             : layout_for<1>(kNormBackward, p.width, kElements<true>);
  });
  // As many blocks as run at once: each leaves a row of partial sums. But no sum of more than kMaxRun rows in a row of
  // float additions, whose error grows with their number.
  constexpr int64_t kThreadsPerProcessor = 1024, kMaxRun = 256;
  const int64_t groups = ceil_div(p.rows, layout.rows);
  const int64_t blocks = processors() * (kThreadsPerProcessor / (layout.threads * layout.rows));
  return std::clamp<int64_t>(ceil_div(groups, blocks), 1, kMaxRun) * layout.rows;
}

namespace {

template <class T, int kVec>
void list(Table& table) {
  const auto add = [&](const RowLayout& layout, int64_t width, int held) {
    table.push_back({"norm_backward",
                     {{"element_bytes", sizeof(T)},
                      {"access_bytes", kVec * sizeof(T)},
                      {"width", width},
                      {"threads", layout.threads},
                      {"rows", layout.rows},
                      {"register_columns", layout.threads * held},
                      {"shared_bytes_per_column", width ? 0 : 2 * sizeof(T)},
                      {"shared_bytes_per_column_and_sum", width ? 0 : sizeof(float)}}});
  };
  for (const RowLayout& layout : kNormBackward)
    if (layout.threads >= kGroup<kVec>) add(layout, layout.threads * kElements<true>, kElements<true>);
  add(std::end(kNormBackward)[-1], 0, kElements<false>);
}

}  // namespace

void list_norm_backward(Table& table) {
  list<float, kFullVec<float>>(table);
  list<float, 1>(table);
  list<bfloat16, kFullVec<bfloat16>>(table);
  list<bfloat16, 1>(table);
}

}  // namespace dlops::cuda
