#include "simt/shared.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <new>

#include "simt/report.h"
#include "simt/worker.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size)
#define ASAN_UNPOISON_MEMORY_REGION(address, size)
#endif

namespace dlops::simt {

SharedMemory::SharedMemory() {
  void* p = mmap(nullptr, 3 * kArena, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  base_ = static_cast<char*>(p);
  if (mprotect(base_ + kArena, kArena, PROT_READ | PROT_WRITE)) throw std::bad_alloc();
}

SharedMemory::~SharedMemory() {
  ASAN_UNPOISON_MEMORY_REGION(base_ + kArena, kArena);
  munmap(base_, 3 * kArena);
}

void SharedMemory::begin(size_t dynamic_bytes, size_t limit, int poison) {
  limit_ = limit;
  poison_ = poison;
  arrays_.clear();
  ASAN_POISON_MEMORY_REGION(base_ + kArena, kArena);
  end_ = base_ + kArena + kRedZone;
  place(nullptr, dynamic_bytes, kDynamicAlignment);
}

void* SharedMemory::array(const SharedArray& array) {
  for (const Placed& placed : arrays_)
    if (placed.array == &array) return placed.begin;
  size_t declared = array.size;
  for (const Placed& placed : arrays_)
    if (placed.array) declared += placed.size;
  if (declared > kMaxUnasked)
    fault(text("shared array ", array.name, ": the declared shared arrays grow to ", declared,
               " bytes, and a kernel can have ", kMaxUnasked));
  if (const size_t total = declared + arrays_[0].size; total > limit_)
    fault(text("shared array ", array.name, ": the block's shared memory grows to ", total, " bytes, and it has ",
               limit_));
  return place(&array, array.size, array.alignment);
}

// At an odd multiple of the alignment: what relies on a larger one is misaligned.
char* SharedMemory::place(const SharedArray* array, size_t size, size_t alignment) {
  const auto address = reinterpret_cast<uintptr_t>(end_);
  char* begin = end_ + (2 * alignment - 1 - (address + alignment - 1) % (2 * alignment));
  end_ = begin + size + kRedZone;
  if (end_ > base_ + 2 * kArena) fault("more shared arrays than the runtime's arena holds");
  ASAN_UNPOISON_MEMORY_REGION(begin, size);
  std::memset(begin, poison_, size);
  arrays_.push_back({array, begin, size});
  return begin;
}

std::string SharedMemory::name(const void* p) const {
  for (const Placed& placed : arrays_)
    if (const size_t byte = static_cast<const char*>(p) - placed.begin; byte < placed.size)
      return text(placed.name(), ", byte ", byte);
  return "shared memory";
}

std::string SharedMemory::outside(const void* p, size_t size) const {
  const char *begin = static_cast<const char*>(p), *end = begin + size;
  const Placed* nearest = nullptr;
  ptrdiff_t distance = 0;
  for (const Placed& placed : arrays_) {
    if (begin >= placed.begin && end <= placed.begin + placed.size) return {};
    const ptrdiff_t away = std::max(placed.begin - begin, end - (placed.begin + placed.size));
    if (!nearest || away < distance) {
      nearest = &placed;
      distance = away;
    }
  }
  return text(begin < nearest->begin ? nearest->begin - begin : end - (nearest->begin + nearest->size),
              begin < nearest->begin ? " bytes before " : " bytes past the end of ", nearest->name(), " (",
              nearest->size, " bytes)");
}

}  // namespace dlops::simt
