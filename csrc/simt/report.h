// What went wrong in a kernel, in words.
#pragma once

#include <sstream>
#include <string>

#include "simt/runtime.h"

namespace dlops::simt {

struct Hex {
  unsigned value;
};
std::ostream& operator<<(std::ostream& out, Hex hex);             // 0x0000ffff
std::ostream& operator<<(std::ostream& out, uint3 index);         // (1, 0, 0)
std::ostream& operator<<(std::ostream& out, const Where& where);  // csrc/cuda/norm.cu:93

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

std::string kernel_name(const Launch& launch);  // forward_kernel<float, 4, 1>

// The source line of a code address, "csrc/cuda/norm.cu:93", with the lines it was inlined into.
std::string source_line(const void* code);

}  // namespace dlops::simt
