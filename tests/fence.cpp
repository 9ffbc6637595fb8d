// The allocator of torch's CPU tensors, for tests: preloaded, it replaces c10::alloc_cpu and c10::free_cpu.
//
// Every buffer, be it input, output or workspace, ends (DLOPS_FENCE=after) or begins (DLOPS_FENCE=before) at a page
// that nobody may touch, so that an access one byte outside it on that side is a fault. And it is full of 0xFF bytes,
// which are NaN in every floating-point dtype, so that an element left unwritten shows.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace {

// header page | closed page | room, in whole pages | closed page
const size_t kPage = sysconf(_SC_PAGESIZE);
const bool kBefore = std::getenv("DLOPS_FENCE") && std::strcmp(std::getenv("DLOPS_FENCE"), "before") == 0;
constexpr size_t kKept = 64 << 20;  // smaller rooms are kept for the next buffer of their size: mapping is slow

struct Pool {
  std::mutex mutex;
  std::unordered_map<size_t, std::vector<char*>> free;
};
Pool& pool = *new Pool;  // never destroyed: buffers are freed as late as the process ends

char* map(size_t room) {
  constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* base = mmap(nullptr, room + 3 * kPage, PROT_NONE, kFlags, -1, 0);
  if (base == MAP_FAILED || mprotect(base, kPage, PROT_READ | PROT_WRITE) ||
      mprotect(static_cast<char*>(base) + 2 * kPage, room, PROT_READ | PROT_WRITE)) {
    std::perror("fence");
    std::abort();
  }
  *static_cast<size_t*>(base) = room;
  return static_cast<char*>(base);
}

}  // namespace

namespace c10 {

__attribute__((visibility("default"))) void* alloc_cpu(size_t bytes) {
  if (bytes == 0) return nullptr;
  const size_t room = (bytes + kPage - 1) / kPage * kPage;
  char* base = nullptr;
  {
    const std::lock_guard lock(pool.mutex);
    std::vector<char*>& kept = pool.free[room];
    if (!kept.empty()) {
      base = kept.back();
      kept.pop_back();
    }
  }
  if (!base) base = map(room);
  return std::memset(base + 2 * kPage + (kBefore ? 0 : room - bytes), 0xFF, bytes);
}

__attribute__((visibility("default"))) void free_cpu(void* data) {
  if (!data) return;
  char* base = reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(data) / kPage * kPage) - 2 * kPage;
  const size_t room = *reinterpret_cast<size_t*>(base);
  if (room >= kKept) {
    munmap(base, room + 3 * kPage);
    return;
  }
  const std::lock_guard lock(pool.mutex);
  pool.free[room].push_back(base);
}

}  // namespace c10
