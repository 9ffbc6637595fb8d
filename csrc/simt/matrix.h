// Matrix products and asynchronous copies, which core/mma.h and core/async.h wrap.
#pragma once

#include <cstddef>
#include <cstdint>

#include "simt/runtime.h"

namespace dlops::simt {

void mma_m16n8k16(float* c, const uint32_t* a, const uint32_t* b, float (*to_float)(uint16_t bits),
                  const Where& where = Where::current());
void load_matrices(uint32_t* r, int count, bool transpose, const void* row, const Where& where = Where::current());

// The source is read and the destination written as late as allowed: when the copy is waited for.
void copy_async(void* shared, const void* global, size_t bytes, size_t valid);
void copy_async_commit();
void copy_async_wait(unsigned pending);

}  // namespace dlops::simt
