// What kernels call: the launch, the built-in variables, and where threads of a block or a warp meet.
//
// None of this is inlined into kernels: kernels are compiled with every memory access reported (hooks.cpp), the runtime
// without.
#pragma once

#include <cstddef>
#include <source_location>
#include <tuple>

#include "simt/types.h"

namespace dlops::simt {

using Where = std::source_location;

struct Launch {
  const char* name;    // as written at the launch
  const void* kernel;  // its code
  dim3 grid, block;
  size_t shared_bytes;
  void (*call)(const void* arguments);
  const void* arguments;
};

// Runs every block of the grid. Throws std::runtime_error with what kernels did wrong; a launch that CUDA would refuse
// is left for cudaGetLastError.
void run(const Launch& launch);

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
            Arguments&&... arguments) {
  using Call = std::tuple<void (*)(Parameters...), Parameters...>;
  const Call call(kernel, static_cast<Arguments&&>(arguments)...);
  run({name, reinterpret_cast<const void*>(kernel), grid, block, shared_bytes,
       [](const void* p) {
         std::apply([](auto kernel, const auto&... parameters) { kernel(parameters...); },
                    *static_cast<const Call*>(p));
       },
       &call});
}

// They cannot change while a thread runs: the compiler may keep them.
[[gnu::const]] uint3 thread_idx();
[[gnu::const]] uint3 block_idx();
[[gnu::const]] dim3 block_dim();
[[gnu::const]] dim3 grid_dim();
[[gnu::const]] unsigned lane();

// A shared array as declared; its address tells arrays apart.
struct SharedArray {
  const char* name;
  size_t size, alignment;
};
void* shared_array(const SharedArray& array);
void* dynamic_shared();

enum class Vote { kNone, kCount, kAnd, kOr };
int block_barrier(const char* name, Vote vote, int predicate, const Where& where);

// Where the lanes of `mask` meet. The last of them calls combine with every lane's payload; then all go on.
using Combine = void (*)(unsigned mask, void* const* payloads);
void warp_collective(const char* name, unsigned mask, Combine combine, void* payload, const Where& where);

}  // namespace dlops::simt
