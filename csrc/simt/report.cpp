#include "simt/report.h"

#include <dlfcn.h>

#include <cstdio>
#include <iomanip>
#include <string_view>
#include <vector>

namespace dlops::simt {
namespace {

// What addr2line prints for a code address: function and file:line, innermost inlined call first. Empty without debug
// information or addr2line.
std::vector<std::string> addr2line(const void* code) {
  Dl_info module;
  if (!dladdr(code, &module)) return {};
  std::ostringstream command;
  command << "addr2line -f -C -i -e '" << module.dli_fname << "' " << std::hex
          << size_t(static_cast<const char*>(code) - static_cast<const char*>(module.dli_fbase)) << " 2>/dev/null";
  FILE* pipe = popen(command.str().c_str(), "r");
  if (!pipe) return {};
  std::vector<std::string> lines;
  std::string line;
  for (int c; (c = getc(pipe)) != EOF;) {
    if (c != '\n') {
      line += char(c);
    } else {
      lines.push_back(line);
      line.clear();
    }
  }
  pclose(pipe);
  if (lines.empty() || lines[0] == "??") return {};
  return lines;
}

// The build maps the root to ".".
std::string tidy(std::string path) {
  if (const size_t root = path.rfind("/./"); root != path.npos) path.erase(0, root + 1);
  if (path.starts_with("./")) path.erase(0, 2);
  return path;
}

// "dlops::(anonymous namespace)::forward_kernel<float, 4, 1>(dlops::Params)" without namespaces and parameters.
std::string short_name(std::string_view name) {
  int depth = 0;
  size_t begin = 0, end = name.size();
  constexpr std::string_view kAnonymous = "(anonymous namespace)";
  for (size_t i = 0; i < name.size(); ++i) {
    if (name.substr(i).starts_with(kAnonymous)) i += kAnonymous.size();
    const char c = i < name.size() ? name[i] : '\0';
    if (c == '<') ++depth;
    if (c == '>') --depth;
    if (depth) continue;
    if (c == ':' || c == ' ') begin = i + 1;
    if (c == '(') {
      end = i;
      break;
    }
  }
  return std::string(name.substr(begin, end - begin));
}

}  // namespace

std::ostream& operator<<(std::ostream& out, Hex hex) {
  return out << "0x" << std::hex << std::setfill('0') << std::setw(8) << hex.value << std::dec;
}

std::ostream& operator<<(std::ostream& out, uint3 index) {
  return out << '(' << index.x << ", " << index.y << ", " << index.z << ')';
}

std::ostream& operator<<(std::ostream& out, const Where& where) {
  return out << tidy(where.file_name()) << ':' << where.line();
}

std::string kernel_name(const Launch& launch) {
  const auto lines = addr2line(launch.kernel);
  return lines.empty() ? launch.name : short_name(lines[0]);
}

std::string source_line(const void* code) {
  const auto lines = addr2line(static_cast<const char*>(code) - 1);  // the call, not what it returns to
  std::string all;
  for (size_t i = 1; i < lines.size(); i += 2) {
    const std::string line = tidy(lines[i].substr(0, lines[i].find(" (discriminator")));
    if (!line.starts_with("csrc/simt/")) all += (all.empty() ? "" : ", inlined at ") + line;
  }
  return all.empty() ? "an unknown line" : all;
}

}  // namespace dlops::simt
