#include "simt/race.h"

#include <algorithm>
#include <bit>

#include "simt/report.h"
#include "simt/shared.h"
#include "simt/worker.h"

// The start of this module, by the linker.
extern "C" const char __ehdr_start[] __attribute__((visibility("hidden")));

namespace dlops::simt {
namespace {

constexpr uint64_t kCodeLimit = 1 << 24;
constexpr size_t kMaxKeptPages = 1 << 14;  // 256 MiB of shadow

// "thread (0, 0, 0) of block (1, 0, 0) wrote it at norm.cu:93"
std::string describe(const Grid& grid, uint64_t block, Record record, const char* verb) {
  return text("thread ", thread_index(grid.launch, record.thread()), " of block ", grid.index(block), " ", verb, " ",
              source_line(record.code()));
}

const char* verb(Access access, bool before) {
  switch (access) {
    case Access::kRead: return before ? "read it at" : "reads it at";
    case Access::kWrite: return before ? "wrote it at" : "writes it at";
    case Access::kAtomic: break;
  }
  return before ? "updated it atomically at" : "updates it atomically at";
}

void report(Grid& grid, const std::string& what, uint64_t block, Record now, Access access, uint64_t block_before,
            Record before, Access access_before) {
  grid.found_race(now.code(), before.code(), [&] {
    return text("kernel ", kernel_name(grid.launch), ": race on ", what, ": ",
                describe(grid, block, now, verb(access, false)), ", ",
                describe(grid, block_before, before, verb(access_before, true)), ", and nothing orders the two");
  });
}

std::string global_name(uintptr_t address) { return text("global memory at ", reinterpret_cast<void*>(address)); }

// Calls f(before, what it was) for the records of `touched` that an access collides with if it is another thread's.
template <class F>
[[gnu::always_inline]] inline void each_collision(const Touched& touched, Access access, F f) {
  f(touched.written, Access::kWrite);
  if (access != Access::kAtomic) f(touched.updated, Access::kAtomic);
  if (access == Access::kRead) return;
  for (const Record& read : touched.read) f(read, Access::kRead);
}

// What the blocks of a launch did to global memory. A record's time is its block, counted on from launch to launch.
class Blocks {
 public:
  void begin_launch(const Grid& grid) {
    base_ += blocks_;
    blocks_ = grid.blocks;
    if (base_ + blocks_ > Record::kMaxTime || pages() > kMaxKeptPages) {
      for (Shard& shard : shards_) shard.shadow.clear();
      base_ = 1;
    }
  }

  // What `block` did to the page at `address`, by records since a time.
  void merge(Grid& grid, uint64_t block, uintptr_t address, ShadowPage& page, uint64_t since) {
    Shard& shard = shards_[address / ShadowPage::kBytes % kShards];
    const std::lock_guard lock(shard.mutex);
    ShadowPage& all = shard.shadow.page(address);
    if (page.odd) all.split();
    if (all.odd) page.split();
    for (size_t i = 0; i < ShadowPage::kPairs; ++i) {
      merge(grid, block, address + 2 * i, page.even[i], all.even[i], since);
      if (page.odd) merge(grid, block, address + 2 * i + 1, page.odd[i], all.odd[i], since);
    }
  }

 private:
  void merge(Grid& grid, uint64_t block, uintptr_t address, const Touched& mine, Touched& all, uint64_t since) {
    const uint64_t me = base_ + block;
    const auto merge_one = [&](Record now, Access access, Record& kept) {
      if (now.time() < since) return;
      now = now.at(me);
      each_collision(all, access, [&](Record before, Access access_before) {
        if (before.time() >= base_ && before.time() != me)
          report(grid, global_name(address), block, now, access, before.time() - base_, before, access_before);
      });
      kept = now;
    };
    for (const Record& read : mine.read) {
      Record& first = all.read[0];
      merge_one(read, Access::kRead, first.time() < base_ || first.time() == me ? first : all.read[1]);
    }
    merge_one(mine.written, Access::kWrite, all.written);
    merge_one(mine.updated, Access::kAtomic, all.updated);
  }

  static constexpr size_t kShards = 64;
  struct Shard {
    std::mutex mutex;
    Shadow shadow;
  };

  size_t pages() const {
    size_t sum = 0;
    for (const Shard& shard : shards_) sum += shard.shadow.size();
    return sum;
  }

  Shard shards_[kShards];
  uint64_t base_ = 1, blocks_ = 0;
};

Blocks& blocks() {
  static Blocks blocks;
  return blocks;
}

}  // namespace

Record::Record(uint64_t time, unsigned thread, const void* code) {
  uint64_t offset = static_cast<const char*>(code) - __ehdr_start;
  if (offset >= kCodeLimit) offset = 0;
  bits_ = time << kTimeShift | uint64_t(thread) << kThreadShift | offset;
}

const void* Record::code() const {
  const uint64_t offset = bits_ & (kCodeLimit - 1);
  return offset ? __ehdr_start + offset : nullptr;
}

void begin_launch(const Grid& grid) { blocks().begin_launch(grid); }

RaceDetector::RaceDetector() : known_(kMaxThreads * kWarpSize), shared_(SharedMemory::kArena / ShadowPage::kBytes) {}

void RaceDetector::begin_block(Grid& grid, uint64_t block) {
  if (time_ > Record::kMaxTime / 2 || global_.size() > kMaxKeptPages) {
    global_.clear();
    shared_ = std::vector<ShadowPage>(shared_.size());
    std::fill(known_.begin(), known_.end(), 0);
    time_ = 0;
  }
  grid_ = &grid;
  block_ = block;
  block_time_ = barrier_time_ = ++time_;
  touched_.clear();
}

void RaceDetector::end_block() {
  for (const uintptr_t address : touched_) blocks().merge(*grid_, block_, address, global_.page(address), block_time_);
}

// Each lane learns what any of them knew, and that all of them were here.
void RaceDetector::warp_barrier(unsigned warp, unsigned lanes) {
  uint64_t* known = &known_[warp * kWarpSize * kWarpSize];
  uint64_t joined[kWarpSize] = {};
  for (unsigned bits = lanes; bits; bits &= bits - 1) {
    const uint64_t* row = known + std::countr_zero(bits) * kWarpSize;
    for (unsigned k = 0; k < kWarpSize; ++k) joined[k] = std::max(joined[k], row[k]);
  }
  ++time_;
  for (unsigned bits = lanes; bits; bits &= bits - 1) joined[std::countr_zero(bits)] = time_;
  for (unsigned bits = lanes; bits; bits &= bits - 1)
    std::copy(joined, joined + kWarpSize, known + std::countr_zero(bits) * kWarpSize);
}

bool RaceDetector::races(Record now, Record before) const {
  if (before.time() < barrier_time_ || before.thread() == now.thread()) return false;
  const bool same_warp = before.thread() / kWarpSize == now.thread() / kWarpSize;
  return !(same_warp && before.time() < known_[now.thread() * kWarpSize + before.thread() % kWarpSize]);
}

void RaceDetector::shared_access(const SharedMemory& shared, const void* p, size_t size, Access access, unsigned thread,
                                 const void* code) {
  while (size) {
    const size_t offset = shared.offset(p), part = std::min(size, ShadowPage::kBytes - offset % ShadowPage::kBytes);
    touch(shared_[offset / ShadowPage::kBytes], p, part, access, thread, code, &shared);
    p = static_cast<const char*>(p) + part;
    size -= part;
  }
}

void RaceDetector::global_access(const void* p, size_t size, Access access, unsigned thread, const void* code) {
  while (size) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(p), offset = address % ShadowPage::kBytes;
    const size_t part = std::min(size, ShadowPage::kBytes - offset);
    ShadowPage& page = global_.page(address);
    if (page.listed != block_time_) {
      page.listed = block_time_;
      touched_.push_back(address - offset);
    }
    touch(page, p, part, access, thread, code, nullptr);
    p = static_cast<const char*>(p) + part;
    size -= part;
  }
}

void RaceDetector::touch(ShadowPage& page, const void* p, size_t size, Access access, unsigned thread, const void* code,
                         const SharedMemory* shared) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(p), end = begin + size;
  if ((begin | end) % 2) page.split();
  const Record now(time_, thread, code);
  for (uintptr_t at = begin; at < end; at += page.odd ? 1 : 2) {
    const size_t byte = at % ShadowPage::kBytes;
    Touched& touched = byte % 2 ? page.odd[byte / 2] : page.even[byte / 2];
    each_collision(touched, access, [&](Record before, Access access_before) {
      if (!races(now, before)) [[likely]]
        return;
      const std::string what = shared ? shared->name(reinterpret_cast<const void*>(at)) : global_name(at);
      report(*grid_, what, block_, now, access, block_, before, access_before);
    });
    Record &first = touched.read[0], &second = touched.read[1];
    if (access != Access::kRead) {
      (access == Access::kWrite ? touched.written : touched.updated) = now;
    } else if (first.time() < barrier_time_ || first.thread() == thread) {
      first = now;
    } else if (second.time() < barrier_time_ || second.thread() / kWarpSize == first.thread() / kWarpSize ||
               thread / kWarpSize != first.thread() / kWarpSize) {
      second = now;
    }
  }
}

}  // namespace dlops::simt
