// Running host kernels: the instruction set, torch's thread pool.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "bind/check.h"
#include "cpu/activation.h"
#include "cpu/column_sum.h"
#include "cpu/conv1d.h"
#include "cpu/norm.h"
#include "cpu/state_update.h"

namespace dlops {

// The best instruction set that this processor has and the build contains: generic, avx2 or avx512.
enum class Isa { generic, avx2, avx512 };
Isa cpu_isa();
const char* cpu_isa_name();

// DLOPS_KERNELS(norm_kernels) is the table of that name for the instruction set in use.
#if defined(__x86_64__)
#define DLOPS_KERNELS(table)                       \
  (cpu_isa() == Isa::avx512 ? dlops::avx512::table \
   : cpu_isa() == Isa::avx2 ? dlops::avx2::table   \
                            : dlops::generic::table)
#else
#define DLOPS_KERNELS(table) dlops::generic::table
#endif

// f(begin, end) over [0, tasks) on torch's threads; elements is the work of one task.
template <class F>
void parallel(int64_t tasks, int64_t elements, const F& f) {
  constexpr int64_t kGrain = 32768;
  if (tasks > 0)
    torch::stable::parallel_for(0, tasks, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements)), f);
}

// The CPU as bind/norm.h, bind/activation.h, bind/conv1d.h and bind/state_update.h see it.
struct Cpu {
  static constexpr DeviceType kType = DeviceType::CPU;
  static constexpr bool kReadable = true;
  static constexpr int64_t kStreamBytes = 16 << 20;

  struct Guard {
    explicit Guard(const Tensor&) {}
  };

  // Rows whose gradients are summed into one partial row. A function of the shape alone, so that the sums do not depend
  // on the number of threads.
  static int64_t block_rows(int64_t rows);
  static int64_t norm_block_rows(const NormBackward& params) { return block_rows(params.rows); }
  static int64_t activation_block_rows(const ActivationPass& params) { return block_rows(params.rows); }

  static void column_sum(const Tensor&, const ColumnSum& params);
  static void norm_forward(const Tensor&, const NormForward& params);
  static void norm_backward(const Tensor&, const NormBackward& params);
  static void act_backward(const Tensor&, const ActivationPass& params);
  static void gate_backward(const Tensor&, const ActivationPass& params);

  static int64_t conv1d_partial_sums(const Conv1dBackward&) { return 1; }
  static int64_t conv1d_scratch(const Conv1dBackward&) { return 0; }
  static void conv1d_forward(const Tensor&, const Conv1dForward& params);
  static void conv1d_backward(const Tensor&, const Conv1dBackward& params);

  static void selective_state_update(const Tensor&, const ScanUpdate& params);
  static void causal_conv1d_update(const Tensor&, const ConvUpdate& params);

  // One kernel of activation_kernels over all tasks.
  static void run(const ActivationPass& params, void (*kernel)(const ActivationPass&, int64_t, int64_t));
};

}  // namespace dlops
