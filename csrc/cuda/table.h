// The static table: which configuration of a kernel serves which sizes, and what stays on the chip.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace dlops::cuda {

struct Configuration {
  const char* kernel;
  std::vector<std::pair<const char*, int64_t>> fields;
};
using Table = std::vector<Configuration>;

void list_norm_forward(Table& table);
void list_norm_backward(Table& table);
void list_activation_backward(Table& table);
void list_skinny_linear(Table& table);

}  // namespace dlops::cuda
