// dlops._C: what torch's dispatcher has no place for. Loading it registers the dlops_cpu ops.
#include <pybind11/pybind11.h>

#include <string>

#include "bind/cpu.h"

#if defined(__x86_64__)
#include <cpuid.h>
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

py::list compiled_isas() {
  py::list isas;
#define DLOPS_NAME(isa) isas.append(#isa);
  DLOPS_FOR_EACH_ISA(DLOPS_NAME)
#undef DLOPS_NAME
  return isas;
}

py::dict cpu_features() {
  py::dict features;
  features["vendor"] = vendor();
  features["isa"] = dlops::cpu_isa_name();
  return features;
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = __VERSION__;
  info["torch"] = DLOPS_TORCH_VERSION;
  info["isas"] = compiled_isas();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "dlops's CPU kernels; loading this module registers the dlops_cpu ops.";
  m.def("build_info", &build_info, "The compiler, the torch whose headers were used, and the instruction sets built.");
  m.def("cpu_features", &cpu_features, "The CPU's vendor and the instruction set whose kernels run.");
}
