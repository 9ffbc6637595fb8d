#include "simt/matrix.h"

#include <cstring>

#include "simt/report.h"
#include "simt/shared.h"
#include "simt/worker.h"

namespace dlops::simt {
namespace {

constexpr unsigned kAll = 0xffffffff;

struct Mma {
  float* c;
  const uint32_t *a, *b;
  float (*to_float)(uint16_t);
};

// All lanes call one and the same form of an instruction.
template <class Payload, class Same>
void check_form(const char* what, void* const* payloads, Same same) {
  const Payload& first = *static_cast<Payload*>(payloads[0]);
  for (int lane = 1; lane < 32; ++lane)
    if (!same(first, *static_cast<Payload*>(payloads[lane])))
      this_worker->fault(text("divergent ", what, ": lane ", lane, " calls another form of it than lane 0"),
                         this_worker->warp_thread(lane));
}

void combine_mma(unsigned, void* const* payloads) {
  check_form<Mma>("mma_m16n8k16", payloads, [](const Mma& x, const Mma& y) { return x.to_float == y.to_float; });
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const Mma& mma = *static_cast<Mma*>(payloads[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int r = 0; r < 4; ++r)
      for (int i = 0; i < 2; ++i) a[g + r % 2 * 8][2 * t + i + r / 2 * 8] = mma.to_float(uint16_t(mma.a[r] >> 16 * i));
    for (int r = 0; r < 2; ++r)
      for (int i = 0; i < 2; ++i) b[2 * t + i + r * 8][g] = mma.to_float(uint16_t(mma.b[r] >> 16 * i));
  }
  for (int lane = 0; lane < 32; ++lane) {
    const Mma& mma = *static_cast<Mma*>(payloads[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      float sum = mma.c[i];
      for (int k = 0; k < 16; ++k) sum += a[g + i / 2 * 8][k] * b[k][2 * t + i % 2];
      mma.c[i] = sum;
    }
  }
}

struct LoadMatrices {
  uint32_t* r;
  int count;
  bool transpose;
  const void* row;
  const void* code;
};

void combine_load(unsigned, void* const* payloads) {
  check_form<LoadMatrices>("load_matrices", payloads, [](const LoadMatrices& x, const LoadMatrices& y) {
    return x.count == y.count && x.transpose == y.transpose;
  });
  const LoadMatrices& any = *static_cast<LoadMatrices*>(payloads[0]);
  for (int m = 0; m < any.count; ++m) {
    uint16_t matrix[8][8];
    for (int row = 0; row < 8; ++row) {
      const LoadMatrices& load = *static_cast<LoadMatrices*>(payloads[8 * m + row]);
      this_worker->access_by(8 * m + row, load.row, 16, Access::kRead, load.code);
      std::memcpy(matrix[row], load.row, 16);
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int row = lane / 4, column = 2 * (lane % 4);
      const uint16_t low = any.transpose ? matrix[column][row] : matrix[row][column];
      const uint16_t high = any.transpose ? matrix[column + 1][row] : matrix[row][column + 1];
      static_cast<LoadMatrices*>(payloads[lane])->r[m] = uint32_t(high) << 16 | low;
    }
  }
}

// A copy's or a matrix row's address in shared memory, aligned.
void check_shared(const char* what, const void* p, size_t alignment, const void* code) {
  if (!this_worker->shared().contains(p))
    fault(text(what, " at ", source_line(code), ": ", p, " is not in shared memory"));
  if (reinterpret_cast<uintptr_t>(p) % alignment)
    fault(text(what, " at ", source_line(code), ": ", p, " is not aligned to ", alignment, " bytes"));
}

}  // namespace

void mma_m16n8k16(float* c, const uint32_t* a, const uint32_t* b, float (*to_float)(uint16_t), const Where& where) {
  Mma payload{c, a, b, to_float};
  warp_collective("mma_m16n8k16", kAll, combine_mma, &payload, where);
}

void load_matrices(uint32_t* r, int count, bool transpose, const void* row, const Where& where) {
  const void* code = __builtin_return_address(0);
  if (int(lane()) < 8 * count) {
    check_shared("load_matrices", row, 16, code);
    this_worker->check_copies(row, 16, Access::kRead, code);
  }
  LoadMatrices payload{r, count, transpose, row, code};
  warp_collective("load_matrices", kAll, combine_load, &payload, where);
}

void copy_async(void* shared, const void* global, size_t bytes, size_t valid) {
  const void* code = __builtin_return_address(0);
  check_shared("copy_async", shared, bytes, code);
  if (reinterpret_cast<uintptr_t>(global) % bytes)
    fault(text("copy_async at ", source_line(code), ": the source ", global, " is not aligned to ", bytes, " bytes"));
  if (valid > bytes) fault(text("copy_async at ", source_line(code), ": ", valid, " bytes of ", bytes));
  if (valid) this_worker->access(global, valid, Access::kRead, code);
  this_worker->access(shared, bytes, Access::kWrite, code);
  Copies& copies = this_worker->thread().copies;
  copies.pending.push_back({shared, global, bytes, valid, copies.groups, code});
}

void copy_async_commit() { ++this_worker->thread().copies.groups; }

void copy_async_wait(unsigned pending) {
  Copies& copies = this_worker->thread().copies;
  std::erase_if(copies.pending, [&](const Copy& copy) {
    if (copy.group + pending >= copies.groups) return false;
    if (copy.valid) this_worker->access_by(lane(), copy.global, copy.valid, Access::kRead, copy.code);
    this_worker->access_by(lane(), copy.shared, copy.bytes, Access::kWrite, copy.code);
    std::memcpy(copy.shared, copy.global, copy.valid);
    std::memset(static_cast<char*>(copy.shared) + copy.valid, 0, copy.bytes - copy.valid);
    return true;
  });
}

}  // namespace dlops::simt
