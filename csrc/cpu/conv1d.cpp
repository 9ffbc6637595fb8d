// Causal convolution on the host. A task's steps pass through buffers of floats in rows of its channels: of one channel
// where steps are adjacent in memory (vectors then run along time), of a few vectors where channels are.
#include "cpu/conv1d.h"

#include <algorithm>
#include <cstdlib>

#include "core/activation.h"
#include "core/simd.h"

namespace dlops {
inline namespace DLOPS_ISA {
namespace {

#define DLOPS_INLINE __attribute__((always_inline))

constexpr int64_t kChunk = 2048;  // elements of a buffer, unless the reach is longer
constexpr int64_t kRun = 8;       // rows

// Zeros, freed at the end of the scope. No std::vector: what it throws with is one symbol for all instruction sets.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : data_(static_cast<T*>(std::calloc(std::max<int64_t>(1, size), sizeof(T)))) {
    if (!data_) std::abort();
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  DLOPS_INLINE T* data() const { return data_; }
  DLOPS_INLINE T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_;
};

float parameter(const void* data, Dtype dtype, int64_t i) {
  switch (dtype) {
    case Dtype::kBFloat16: return to_float(static_cast<const bfloat16*>(data)[i]);
    case Dtype::kFloat16: return to_float(static_cast<const float16*>(data)[i]);
    default: return static_cast<const float*>(data)[i];
  }
}

// A block of channels: their parameters, and the chunk of a sequence at hand. kSplit: there is a seq_idx. kWidth: the
// number of taps where the compiler shall know it, else 0.
template <class T, bool kLast, bool kSplit, int kWidth>
class Channels {
 public:
  Channels(const Conv1d& p, int64_t block)
      : p_(p),
        first_(block * kRow),
        count_(std::min<int64_t>(kRow, p.channels - first_)),
        limit_(std::max(kChunk / kRow, p.reach)),
        weight_(p.width * kRow),
        bias_(kRow),
        x_((p.reach + limit_) * kRow),
        owner_(kSplit ? 2 * p.reach + limit_ : 0) {
    for (int64_t c = 0; c < count_; ++c) {
      for (int64_t k = 0; k < p.width; ++k)
        weight_[k * kRow + c] = parameter(p.weight, p.weight_dtype, (first_ + c) * p.width + k);
      if (p.bias) bias_[c] = parameter(p.bias, p.weight_dtype, first_ + c);
    }
  }

  void forward(const Conv1dForward& p, int64_t sequence) {
    const Sequence part = sequence_of(p, sequence);
    T* y = begin_of<T>(p, p.y, sequence, part, first_);
    for (int64_t begin = 0; begin < part.length; begin += limit_) {
      const int64_t rows = std::min(limit_, part.length - begin);
      read(sequence, part, begin, rows);
      each(rows, [&](int64_t column, auto channels) DLOPS_INLINE {
        const Filter filter(*this, column, channels);
        return [=, this, &p, out = at(p.y, y, begin, column)](int64_t row, auto lanes) DLOPS_INLINE {
          vfloat v = filter.convolved(row, lanes);
          if (p.silu) v = Silu(nullptr).value(v);
          store(at(p.y, out, row, 0), same(v, row, 0, lanes), lanes);
        };
      });
    }
    if (p.final) write_final(p, sequence, part);
  }

  // Chunks from the last to the first: what a step receives comes from the steps that follow.
  void backward(const Conv1dBackward& p) {
    const Buffer<double> total((p.width + 1) * kRow);  // of the gradients of weight, and of bias
    const int64_t size = (p.reach + limit_) * kRow;
    const Buffer<float> dpre(size), dfinal(p.reach * kRow);
    for (int64_t sequence = 0; sequence < p.sequences; ++sequence) {
      const Sequence part = sequence_of(p, sequence);
      const T* dy = begin_of<T>(p, p.dy, sequence, part, first_);
      std::fill(dpre.data(), dpre.data() + size, 0.0f);
      read(sequence, part, 0, 0);
      read_final_gradient(p, sequence, part, dfinal.data());
      for (int64_t end = part.length; end > 0;) {
        const int64_t begin = (end - 1) / limit_ * limit_, rows = end - begin;
        std::copy_backward(dpre.data(), dpre.data() + p.reach * kRow, dpre.data() + (rows + p.reach) * kRow);
        read(sequence, part, begin, rows);
        each(rows, [&](int64_t column, auto channels) DLOPS_INLINE {
          const Filter filter(*this, column, channels);
          return [=, this, &p, from = at(p.dy, dy, begin, column), to = &dpre[column]](int64_t row, auto lanes)
                     DLOPS_INLINE {
                       vfloat v = load(at(p.dy, from, row, 0), lanes);
                       if (p.silu) v *= Silu(nullptr).slope(filter.convolved(row, lanes));
                       store(to + row * kRow, same(v, row, 0, lanes), lanes);
                     };
        });
        if (p.dweight || p.dbias) add_parameter_gradients(rows, dpre.data(), total.data());
        if (p.dx.data) write_gradient(p, sequence, part, begin, rows, dpre.data(), dfinal.data());
        end = begin;
      }
      if (p.dinitial) write_initial_gradient(p, sequence, part, dpre.data(), dfinal.data());
    }
    for (int64_t c = 0; c < count_; ++c) {
      for (int64_t k = 0; p.dweight && k < p.width; ++k)
        p.dweight[(first_ + c) * p.width + k] = float(total[k * kRow + c]);
      if (p.dbias) p.dbias[first_ + c] = float(total[p.width * kRow + c]);
    }
  }

 private:
  static constexpr int kRow = kLast ? kConv1dChannels : 1;

  // make(column, lanes) gives a body(row, lanes), with what it needs of these channels in registers; that is called for
  // the first `rows` rows of the chunk. Two vectors of channels at a time: a cache line, where rows are too far apart
  // to stay in cache.
  template <class Make>
  DLOPS_INLINE void each(int64_t rows, Make make) const {
    if constexpr (kLast) {
      int64_t done = 0;
      for (; done + 2 * kLanes <= count_; done += 2 * kLanes) {
        const auto left = make(done, Full{}), right = make(done + kLanes, Full{});
        for (int64_t row = 0; row < rows; ++row) {
          left(row, Full{});
          right(row, Full{});
        }
      }
      for_lanes(count_ - done, [&](int64_t column, auto lanes) DLOPS_INLINE {
        const auto body = make(done + column, lanes);
        for (int64_t row = 0; row < rows; ++row) body(row, lanes);
      });
    } else {
      const auto body = make(0, Full{});
      for_lanes(rows, [&](int64_t row, auto lanes) DLOPS_INLINE { body(row, lanes); });
    }
  }

  template <class Pointer, class U>
  static DLOPS_INLINE U* at(const Signal<Pointer>& signal, U* data, int64_t row, int64_t column) {
    return data + row * (kLast ? signal.step : 1) + column;
  }

  // A parameter of a vector of channels, or of the one channel.
  template <class Count>
  static DLOPS_INLINE vfloat of_channels(const float* values, Count count) {
    if constexpr (kLast) return load(values, count);
    return splat<vfloat>(values[0]);
  }

  // v where step `row` of the chunk and the step `back` before belong to one sequence and are no padding, else zero.
  template <class Lanes>
  DLOPS_INLINE vfloat same(vfloat v, int64_t row, int64_t back, Lanes lanes) const {
    if constexpr (kSplit) {
      const int32_t* owner = owner_.data() + p_.reach + row;
      if constexpr (kLast) return owner[0] == owner[-back] && owner[0] >= 0 ? v : vfloat{};
      const vint own = indices(owner, lanes);
      return vselect((own == indices(owner - back, lanes)) & (own >= 0), v, vfloat{});
    }
    return v;
  }

  static DLOPS_INLINE vint indices(const int32_t* p, Full) { return load_raw<vint>(p); }
  static DLOPS_INLINE vint indices(const int32_t* p, Partial part) {
    vint v{};
    __builtin_memcpy(&v, p, part.count * sizeof(int32_t));
    return v;
  }

  // How far before its step weight[:, tap] looks.
  DLOPS_INLINE int64_t back(int64_t tap) const { return (p_.width - 1 - tap) * p_.dilation; }

  // What the step sees there.
  template <class Lanes>
  DLOPS_INLINE vfloat seen(int64_t row, int64_t column, int64_t back, Lanes lanes) const {
    return same(load(&x_[(p_.reach + row - back) * kRow + column], lanes), row, back, lanes);
  }

  // The taps of a vector of channels, in registers where their number is known.
  template <class Count>
  struct Filter {
    Filter(const Channels& channels, int64_t column, Count count)
        : channels(channels),
          count(count),
          weights(channels.weight_.data() + column),
          x(channels.x_.data() + channels.p_.reach * kRow + column),
          bias(of_channels(channels.bias_.data() + column, count)),
          width(kWidth ? kWidth : channels.p_.width),
          dilation(channels.p_.dilation) {
      for (int k = 0; k < kWidth; ++k) known[k] = of_channels(weights + k * kRow, count);
    }

    // start plus the sum of value(back) times the tap that looks so far back.
    template <class Value>
    DLOPS_INLINE vfloat sum(vfloat start, Value value) const {
#pragma GCC unroll 4
      for (int64_t k = 0; k < width; ++k)
        start += value((width - 1 - k) * dilation) * (kWidth ? known[k] : of_channels(weights + k * kRow, count));
      return start;
    }

    template <class Lanes>
    DLOPS_INLINE vfloat convolved(int64_t row, Lanes lanes) const {
      return sum(bias, [&](int64_t back) DLOPS_INLINE {
        return channels.same(load(x + (row - back) * kRow, lanes), row, back, lanes);
      });
    }

    const Channels& channels;
    const Count count;
    const float *weights, *x;
    vfloat known[kWidth ? kWidth : 1], bias;
    const int64_t width, dilation;
  };

  // Steps [begin, begin + rows) of the sequence, and before them the `reach` steps or states that they see.
  void read(int64_t sequence, const Sequence& part, int64_t begin, int64_t rows) {
    const T* x = begin_of<T>(p_, p_.x, sequence, part, first_);
    const T* initial = static_cast<const T*>(p_.initial);
    for (int64_t row = begin; row < p_.reach; ++row)
      for (int64_t c = 0; c < count_; ++c)
        x_[(row - begin) * kRow + c] = initial ? to_float(initial[states(sequence, c) + row]) : 0.0f;
    const int64_t from = std::max<int64_t>(0, begin - p_.reach);
    float* to = x_.data() + (p_.reach + from - begin) * kRow;
    each(begin + rows - from, [&](int64_t column, auto) DLOPS_INLINE {
      return [=, this, in = at(p_.x, x, from, column), out = to + column](int64_t row, auto lanes)
                 DLOPS_INLINE { store(out + row * kRow, load(at(p_.x, in, row, 0), lanes), lanes); };
    });
    if constexpr (kSplit) {
      const int32_t* index = p_.seq_idx + sequence * p_.seqlen;
      for (int64_t row = -p_.reach; row < rows + p_.reach; ++row)
        owner_[p_.reach + row] = p_.seqlen ? index[std::clamp<int64_t>(begin + row, 0, p_.seqlen - 1)] : 0;
    }
  }

  int64_t states(int64_t sequence, int64_t c) const { return (sequence * p_.channels + first_ + c) * p_.reach; }

  // Whether the final states hold step `step` of the sequence, which may be one of the initial states.
  bool in_final(int64_t sequence, int64_t step) const {
    if (!kSplit || p_.seqlen == 0) return true;
    const int32_t* index = p_.seq_idx + sequence * p_.seqlen;
    const int32_t last = index[p_.seqlen - 1];
    return last >= 0 && index[std::max<int64_t>(0, step)] == last;
  }

  void write_final(const Conv1dForward& p, int64_t sequence, const Sequence& part) const {
    const T* x = begin_of<T>(p, p.x, sequence, part, first_);
    const T* initial = static_cast<const T*>(p.initial);
    T* final = static_cast<T*>(p.final);
    for (int64_t c = 0; c < count_; ++c)
      for (int64_t row = 0; row < p.reach; ++row) {
        const int64_t step = part.length - p.reach + row;
        T value = from_float<T>(0.0f);
        if (in_final(sequence, step)) {
          if (step >= 0)
            value = x[step * p.x.step + c * p.x.channel];
          else if (initial)
            value = initial[states(sequence, c) + p.reach + step];
        }
        final[states(sequence, c) + row] = value;
      }
  }

  // dfinal of the steps and states that the final states hold; row r is step length - reach + r.
  void read_final_gradient(const Conv1dBackward& p, int64_t sequence, const Sequence& part, float* dfinal) const {
    const T* from = static_cast<const T*>(p.dfinal);
    for (int64_t row = 0; row < p.reach; ++row) {
      const bool held = from && in_final(sequence, part.length - p.reach + row);
      for (int64_t c = 0; c < count_; ++c)
        dfinal[row * kRow + c] = held ? to_float(from[states(sequence, c) + row]) : 0.0f;
    }
  }

  void add_parameter_gradients(int64_t rows, const float* dpre, double* total) const {
    for (int64_t k = 0; k <= p_.width; ++k) {
      const auto term = [&](int64_t row, int64_t column, auto lanes) DLOPS_INLINE {
        const vfloat d = load(dpre + row * kRow + column, lanes);
        return k < p_.width ? d * seen(row, column, back(k), lanes) : d;
      };
      if constexpr (kLast) {
        for_lanes(count_, [&](int64_t column, auto lanes) DLOPS_INLINE {
          vfloat sum{};
          for (int64_t run = 0; run < rows; run += kRun) {  // sums of short sums: few additions round each term
            vfloat part{};
            for (int64_t row = run; row < std::min(run + kRun, rows); ++row) part += term(row, column, lanes);
            sum += part;
          }
          for (int i = 0; i < kLanes && column + i < count_; ++i) total[k * kRow + column + i] += sum[i];
        });
      } else {
        double sum[1];
        row_sums<1>(rows, sum,
                    [&](int64_t row, auto lanes, vfloat(&t)[1]) DLOPS_INLINE { t[0] = term(row, 0, lanes); });
        total[k] += sum[0];
      }
    }
  }

  void write_gradient(const Conv1dBackward& p, int64_t sequence, const Sequence& part, int64_t begin, int64_t rows,
                      const float* dpre, const float* dfinal) const {
    T* dx = begin_of<T>(p, p.dx, sequence, part, first_);
    const int64_t first_final = part.length - p.reach - begin;  // row of the chunk that the final states start with
    each(rows, [&](int64_t column, auto channels) DLOPS_INLINE {
      const Filter filter(*this, column, channels);
      return [=, this, &p, from = dpre + column, to = at(p.dx, dx, begin, column)](int64_t row, auto lanes)
                 DLOPS_INLINE {
                   vfloat sum{};
                   if (p.dfinal) sum = final_gradient(dfinal, row - first_final, column, lanes);
                   sum = filter.sum(sum, [&](int64_t back) DLOPS_INLINE {
                     return same(load(from + (row + back) * kRow, lanes), row + back, back, lanes);
                   });
                   store(at(p.dx, to, row, 0), sum, lanes);
                 };
    });
  }

  // Rows of dfinal from `row` on, zero before the first.
  template <class Lanes>
  DLOPS_INLINE vfloat final_gradient(const float* dfinal, int64_t row, int64_t column, Lanes lanes) const {
    if constexpr (kLast) return row >= 0 ? load(dfinal + row * kRow + column, lanes) : vfloat{};
    vfloat v{};
    for (int i = 0; i < kLanes; ++i)
      if (row + i >= 0 && row + i < p_.reach) v[i] = dfinal[row + i];
    return v;
  }

  void write_initial_gradient(const Conv1dBackward& p, int64_t sequence, const Sequence& part, const float* dpre,
                              const float* dfinal) const {
    T* dinitial = static_cast<T*>(p.dinitial);
    for (int64_t c = 0; c < count_; ++c)
      for (int64_t row = 0; row < p.reach; ++row) {
        float sum = row >= part.length ? dfinal[(row - part.length) * kRow + c] : 0.0f;
        for (int64_t k = 0; k < p.width; ++k) {
          const int64_t step = row - p.reach + back(k);
          const bool owned = !kSplit || owner_[p.reach + std::max<int64_t>(0, step)] == owner_[0];
          if (step >= 0 && owned) sum += dpre[step * kRow + c] * weight_[k * kRow + c];
        }
        dinitial[states(sequence, c) + row] = from_float<T>(sum);
      }
  }

  const Conv1d& p_;
  const int64_t first_, count_, limit_;  // channels, and steps of a chunk
  const Buffer<float> weight_, bias_;    // rows of taps
  const Buffer<float> x_;                // rows -reach, ... of the chunk
  const Buffer<int32_t> owner_;          // its seq_idx, for rows -reach to reach past its end
};

// Calls f with a null pointer to the Channels that p needs.
template <class T, bool kLast, class F>
void with_layout(const Conv1d& p, F f) {
  if (p.seq_idx)
    f((Channels<T, kLast, true, 0>*)nullptr);
  else if (p.width == 4)
    f((Channels<T, kLast, false, 4>*)nullptr);
  else
    f((Channels<T, kLast, false, 0>*)nullptr);
}

template <class F>
void with_channels(const Conv1d& p, F f) {
  const auto typed = [&]<class T>(T*) { p.channels_last ? with_layout<T, true>(p, f) : with_layout<T, false>(p, f); };
  switch (p.dtype) {
    case Dtype::kFloat32: return typed((float*)nullptr);
    case Dtype::kBFloat16: return typed((bfloat16*)nullptr);
    case Dtype::kFloat16: return typed((float16*)nullptr);
  }
}

void forward(const Conv1dForward& p, int64_t begin, int64_t end) {
  const int64_t blocks = conv1d_blocks(p);
  with_channels(p, [&]<class C>(C*) {
    for (int64_t task = begin; task < end; ++task) C(p, task % blocks).forward(p, task / blocks);
  });
}

void backward(const Conv1dBackward& p, int64_t begin, int64_t end) {
  with_channels(p, [&]<class C>(C*) {
    for (int64_t block = begin; block < end; ++block) C(p, block).backward(p);
  });
}

}  // namespace

const Conv1dKernels conv1d_kernels = {forward, backward};

}  // namespace DLOPS_ISA
}  // namespace dlops
