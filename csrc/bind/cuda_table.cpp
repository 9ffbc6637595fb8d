#include "bind/cuda_table.h"

#include "cuda/table.h"

namespace py = pybind11;

namespace dlops {

namespace {

py::list kernel_table() {
  cuda::Table table;
  cuda::list_norm_forward(table);
  cuda::list_norm_backward(table);
  cuda::list_activation_backward(table);
  cuda::list_skinny_linear(table);
  py::list rows;
  for (const cuda::Configuration& configuration : table) {
    py::dict row;
    row["kernel"] = configuration.kernel;
    for (const auto& [name, value] : configuration.fields) row[name] = value;
    rows.append(row);
  }
  return rows;
}

}  // namespace

void define_kernel_table(py::module_& module) {
  module.def(
      "kernel_table", &kernel_table,
      "The configurations of every kernel, a dict each: the kernel, the bytes of an element and of an access, and "
      "what it serves.\n\n"
      "norm_forward, norm_backward: rows of up to `width` columns (0: any), `threads` for a row and `rows` in a "
      "block. register_columns of a row stay in registers. Others wait in shared memory, at "
      "shared_bytes_per_column, or where a block has less of it are read again; the backward sums their weight "
      "gradients there too, shared_bytes_per_column_and_sum for each of the two, which comes first.\n"
      "activation_backward: rows of up to `width` columns (0: any), `threads` adjacent accesses and `rows` in a "
      "block.\n"
      "skinny_linear: up to `rows` rows of x and `weights` weights; a block takes `outputs` columns and `depth` "
      "of K at a time.");
}

}  // namespace dlops
