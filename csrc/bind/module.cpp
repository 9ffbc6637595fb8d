// dlops._C: what torch's dispatcher has no place for. Loading it registers the dlops_cpu ops.
#include <pybind11/pybind11.h>

#include <string>

#include "bind/cpu.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#if defined(__clang__)
#define DLOPS_COMPILER __VERSION__
#else
#define DLOPS_COMPILER "GCC " __VERSION__
#endif

namespace py = pybind11;

namespace {

std::string vendor() {
#if defined(__x86_64__)
  unsigned eax, name[3];
  if (!__get_cpuid(0, &eax, &name[0], &name[2], &name[1])) return "";
  return std::string(reinterpret_cast<const char*>(name), sizeof(name));
#else
  return "";
#endif
}

// The vendor's number of the microarchitecture: on an AMD CPU 25 (Zen 3 and 4), 26 (Zen 5).
unsigned family() {
#if defined(__x86_64__)
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return 0;
  const unsigned base = eax >> 8 & 0xF, extended = eax >> 20 & 0xFF;
  return base == 0xF ? base + extended : base;
#else
  return 0;
#endif
}

py::dict cpu_features() {
  py::dict features;
  features["vendor"] = vendor();
  features["family"] = family();
#if defined(__x86_64__)
  __builtin_cpu_init();
  features["avx2"] = bool(__builtin_cpu_supports("avx2"));
  features["fma"] = bool(__builtin_cpu_supports("fma"));
  features["f16c"] = bool(__builtin_cpu_supports("f16c"));
  features["avx512"] = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                       __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
  features["isa"] = dlops::cpu_isa_name();
  return features;
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = DLOPS_COMPILER;
  info["flags"] = DLOPS_FLAGS;
  info["torch"] = DLOPS_TORCH_VERSION;
  py::list isas;
#define DLOPS_NAME(isa) isas.append(#isa);
  DLOPS_FOR_EACH_ISA(DLOPS_NAME)
#undef DLOPS_NAME
  info["isas"] = isas;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "dlops's CPU kernels; loading this module registers the dlops_cpu ops.";
  m.def("build_info", &build_info, "The compiler, its flags, the torch built against, and the instruction sets built.");
  m.def("cpu_features", &cpu_features,
        "The CPU's vendor, family and features, and the instruction set whose kernels run.");
}
