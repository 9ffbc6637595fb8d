#include "bind/cpu.h"

#include "cpu/column_sum.h"

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

Tensor empty_partial(const Tensor& x, int64_t blocks, int64_t width) {
  return allocate(x, {blocks, width}, ScalarType::Float);
}

Tensor column_sum(const Tensor& x, Dtype dtype, const Tensor& partial) {
  const int64_t rows = partial.size(0), width = partial.size(1);
  Tensor out = allocate(x, {width}, x.scalar_type());
  const ColumnSum params{dtype, rows, width, partial.const_data_ptr<float>(), out.mutable_data_ptr()};
  const auto& kernels = DLOPS_KERNELS(column_sum_kernels);
  constexpr int64_t kColumns = 64;  // the kernel's tile
  parallel((width + kColumns - 1) / kColumns, kColumns * rows, [&](int64_t begin, int64_t end) {
    kernels.column_sum(params, begin * kColumns, std::min(end * kColumns, width));
  });
  return out;
}

}  // namespace dlops
