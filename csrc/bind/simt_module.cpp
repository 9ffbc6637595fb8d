// dlops._simt: importing it registers the dlops_simt ops, the CUDA kernels run on the host.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "bind/cuda_table.h"
#include "simt/launch.h"

namespace py = pybind11;
using dlops::simt::Config;

namespace {

py::dict configuration() {
  const Config config = dlops::simt::config();
  py::dict d;
  d["seed"] = config.seed;
  d["poison"] = config.poison;
  d["detect_races"] = config.detect_races;
  d["threads"] = config.threads;
  return d;
}

// Sets what is not None; returns what was set before.
py::dict configure(py::object seed, py::object poison, py::object detect_races, py::object threads) {
  py::dict before = configuration();
  Config config = dlops::simt::config();
  if (!seed.is_none()) config.seed = seed.cast<uint64_t>();
  if (!poison.is_none()) config.poison = poison.cast<int>();
  if (!detect_races.is_none()) config.detect_races = detect_races.cast<bool>();
  if (!threads.is_none()) config.threads = threads.cast<int>();
  if (config.poison < 0 || config.poison > 255)
    throw std::invalid_argument("poison: got " + std::to_string(config.poison) + ", accepted is a byte, 0 to 255");
  if (config.threads < 0)
    throw std::invalid_argument("threads: got " + std::to_string(config.threads) + ", accepted is 0 or more");
  dlops::simt::configure(config);
  return before;
}

}  // namespace

PYBIND11_MODULE(_simt, m) {
  m.doc() = "dlops's CUDA kernels on a host SIMT runtime, for tests; loading this module registers the dlops_simt ops.";
  m.def("configure", &configure, py::kw_only(), py::arg("seed") = py::none(), py::arg("poison") = py::none(),
        py::arg("detect_races") = py::none(), py::arg("threads") = py::none(),
        "Change settings of later launches, and return all settings as they were.\n\n"
        "seed: of the order in which blocks and threads run.\n"
        "poison: the byte that shared memory holds before it is written.\n"
        "detect_races: whether two threads' unordered accesses of one address are an error.\n"
        "threads: OS threads that run the blocks of a launch; 0 means one per CPU.");
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["compiler"] = __VERSION__;
        info["torch"] = DLOPS_TORCH_VERSION;
        info["checks"] = DLOPS_SIMT_CHECKS;
        return info;
      },
      "The compiler, the torch whose headers were used, and how memory accesses are checked.");
  dlops::define_kernel_table(m);
}
