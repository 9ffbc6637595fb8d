// What the compiler calls in kernels. -fsanitize=thread calls the __tsan functions before every load and store,
// -fsanitize=bounds,alignment the __ubsan functions where an index or an address is wrong. This module defines them
// itself: the sanitizers' own runtimes would not know fibers from threads, blocks from launches, or shared memory from
// global.
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "simt/report.h"
#include "simt/worker.h"

using dlops::simt::Access;
using dlops::simt::fault;
using dlops::simt::text;
using dlops::simt::this_worker;

namespace {

[[gnu::always_inline]] inline void touch(const void* p, size_t size, Access access, const void* code) {
  if (this_worker && size) this_worker->access(p, size, access, code);
}

// What the compilers pass, as they lay it out.
struct SourceLocation {
  const char* file;
  uint32_t line, column;
};

struct Type {
  uint16_t kind, info;
  char name[];
};

struct OutOfBounds {
  SourceLocation location;
  const Type *array, *index;
};

struct TypeMismatch {
  SourceLocation location;
  const Type* type;
  uint8_t log_alignment, kind;
};

[[noreturn]] void wrong(const std::string& what, const void* code) {
  const std::string message = text(what, ", at ", dlops::simt::source_line(code));
  if (this_worker) fault(message);
  std::fprintf(stderr, "dlops simt: in host code: %s\n", message.c_str());
  std::abort();
}

}  // namespace

extern "C" {

#define DLOPS_SIMT_HOOKS(size)                                                                              \
  void __tsan_read##size(void* p) { touch(p, size, Access::kRead, __builtin_return_address(0)); }           \
  void __tsan_write##size(void* p) { touch(p, size, Access::kWrite, __builtin_return_address(0)); }         \
  void __tsan_unaligned_read##size(void* p) { touch(p, size, Access::kRead, __builtin_return_address(0)); } \
  void __tsan_unaligned_write##size(void* p) { touch(p, size, Access::kWrite, __builtin_return_address(0)); }
DLOPS_SIMT_HOOKS(1)
DLOPS_SIMT_HOOKS(2)
DLOPS_SIMT_HOOKS(4)
DLOPS_SIMT_HOOKS(8)
DLOPS_SIMT_HOOKS(16)

void __tsan_read_range(void* p, size_t size) { touch(p, size, Access::kRead, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t size) { touch(p, size, Access::kWrite, __builtin_return_address(0)); }

// What kernels call for memcpy and its kin (cuda.h).
void* __tsan_memcpy(void* to, const void* from, size_t size) {
  touch(from, size, Access::kRead, __builtin_return_address(0));
  touch(to, size, Access::kWrite, __builtin_return_address(0));
  return std::memcpy(to, from, size);
}
void* __tsan_memmove(void* to, const void* from, size_t size) {
  touch(from, size, Access::kRead, __builtin_return_address(0));
  touch(to, size, Access::kWrite, __builtin_return_address(0));
  return std::memmove(to, from, size);
}
void* __tsan_memset(void* to, int value, size_t size) {
  touch(to, size, Access::kWrite, __builtin_return_address(0));
  return std::memset(to, value, size);
}

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
char __tsan_atomic8_load(const volatile char* p, int order) { return __atomic_load_n(p, order); }  // static locals

void __ubsan_handle_out_of_bounds(const OutOfBounds* data, uintptr_t index) {
  wrong(text("index ", intptr_t(index), " is outside an array of type ", data->array->name),
        __builtin_return_address(0));
}

void __ubsan_handle_type_mismatch_v1(const TypeMismatch* data, uintptr_t address) {
  wrong(text("misaligned access: ", reinterpret_cast<void*>(address), " is no address of type ", data->type->name,
             ", which is aligned to ", 1 << data->log_alignment, " bytes"),
        __builtin_return_address(0));
}
}
