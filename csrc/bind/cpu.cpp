#include "bind/cpu.h"

namespace dlops {

Isa cpu_isa() {
#if defined(__x86_64__)
  static const Isa isa = [] {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return Isa::generic;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
      return Isa::avx512;
    return __builtin_cpu_supports("avx2") ? Isa::avx2 : Isa::generic;
  }();
  return isa;
#else
  return Isa::generic;
#endif
}

const char* cpu_isa_name() {
  switch (cpu_isa()) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "generic";
  }
}

int64_t Cpu::block_rows(int64_t rows) {
  constexpr int64_t kBlocks = 128, kMinRows = 8;
  return std::max<int64_t>(kMinRows, (rows + kBlocks - 1) / kBlocks);
}

void Cpu::column_sum(const Tensor&, const ColumnSum& params) {
  const auto& kernels = DLOPS_KERNELS(column_sum_kernels);
  constexpr int64_t kColumns = 64;  // the kernel's tile
  parallel((params.width + kColumns - 1) / kColumns, kColumns * params.rows, [&](int64_t begin, int64_t end) {
    kernels.column_sum(params, begin * kColumns, std::min(end * kColumns, params.width));
  });
}

void Cpu::norm_forward(const Tensor&, const NormForward& params) {
  const auto& kernels = DLOPS_KERNELS(norm_kernels);
  parallel(params.rows, params.width, [&](int64_t begin, int64_t end) { kernels.forward(params, begin, end); });
}

void Cpu::norm_backward(const Tensor&, const NormBackward& params) {
  const auto& kernels = DLOPS_KERNELS(norm_kernels);
  const int64_t width = params.width, blocks = (params.rows + params.block_rows - 1) / params.block_rows;
  parallel(width ? blocks : 0, params.block_rows * width, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(2 * width);
    kernels.backward(params, begin, end, scratch.data());
  });
}

void Cpu::act_backward(const Tensor&, const ActivationPass& params) {
  run(params, DLOPS_KERNELS(activation_kernels).act_backward);
}

void Cpu::gate_backward(const Tensor&, const ActivationPass& params) {
  run(params, DLOPS_KERNELS(activation_kernels).gate_backward);
}

void Cpu::run(const ActivationPass& params, void (*kernel)(const ActivationPass&, int64_t, int64_t)) {
  const int64_t blocks = (params.rows + params.block_rows - 1) / params.block_rows;
  const int64_t chunks = (params.width + kActivationColumns - 1) / kActivationColumns;
  const int64_t work = std::min(params.rows, params.block_rows) * std::min(params.width, kActivationColumns);
  parallel(blocks * chunks, work, [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
}

// Elements of a task: of one sequence, its taps counted.
static int64_t conv1d_work(const Conv1d& p) {
  return p.seqlen * p.width * (p.channels_last ? kConv1dChannels : 1) / (p.bounds ? p.sequences + 1 : 1);
}

void Cpu::conv1d_forward(const Tensor&, const Conv1dForward& params) {
  const auto& kernels = DLOPS_KERNELS(conv1d_kernels);
  parallel(params.sequences * conv1d_blocks(params), conv1d_work(params),
           [&](int64_t begin, int64_t end) { kernels.forward(params, begin, end); });
}

void Cpu::conv1d_backward(const Tensor&, const Conv1dBackward& params) {
  const auto& kernels = DLOPS_KERNELS(conv1d_kernels);
  parallel(conv1d_blocks(params), conv1d_work(params) * params.sequences,
           [&](int64_t begin, int64_t end) { kernels.backward(params, begin, end); });
}

void Cpu::selective_state_update(const Tensor&, const ScanUpdate& params) {
  const auto& kernels = DLOPS_KERNELS(state_update_kernels);
  parallel(params.batch * params.heads * update_blocks(params.channels),
           kUpdateChannels * std::max<int64_t>(1, params.states),
           [&](int64_t begin, int64_t end) { kernels.scan(params, begin, end); });
}

void Cpu::causal_conv1d_update(const Tensor&, const ConvUpdate& params) {
  const auto& kernels = DLOPS_KERNELS(state_update_kernels);
  parallel(params.batch * update_blocks(params.channels),
           kUpdateChannels * (params.steps * params.width + params.state_len),
           [&](int64_t begin, int64_t end) { kernels.conv(params, begin, end); });
}

}  // namespace dlops
