// kernel_table() of dlops._cuda and dlops._simt.
#pragma once

#include <pybind11/pybind11.h>

namespace dlops {

void define_kernel_table(pybind11::module_& module);

}  // namespace dlops
