// Shadow memory: who touched each byte last. What the race detector compares an access with.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <unordered_map>

namespace dlops::simt {

enum class Access { kRead, kWrite, kAtomic };

// One access as 64 bits: when, by which thread of the block, by which code. A zero is no access.
class Record {
 public:
  static constexpr uint64_t kMaxTime = (uint64_t{1} << 30) - 1;

  Record() : bits_(0) {}
  Record(uint64_t time, unsigned thread, const void* code);

  uint64_t time() const { return bits_ >> kTimeShift; }
  unsigned thread() const { return bits_ >> kThreadShift & 0x3ff; }
  const void* code() const;  // null if it lies too far into the module
  Record at(uint64_t time) const { return Record((bits_ & ((uint64_t{1} << kTimeShift) - 1)) | time << kTimeShift); }

 private:
  static constexpr int kThreadShift = 24, kTimeShift = 34;
  explicit Record(uint64_t bits) : bits_(bits) {}

  uint64_t bits_;
};

// The last plain write, the last atomic update, and two reads, of different warps if there were any. An update does not
// take the place of a write: others' updates race with the write alone.
struct Touched {
  Record written, updated, read[2];
};

// The records of 1 KiB, of two bytes each until somebody touches one byte alone, of each byte from then on.
struct ShadowPage {
  static constexpr uintptr_t kBytes = 1024, kPairs = kBytes / 2;

  Touched even[kPairs];
  std::unique_ptr<Touched[]> odd;
  uint64_t listed = 0;  // when the page was last noted as touched

  void split() {
    if (odd) return;
    odd = std::make_unique<Touched[]>(kPairs);
    std::copy(even, even + kPairs, odd.get());
  }
};

// Shadow pages by address, made as they are touched.
class Shadow {
 public:
  ShadowPage& page(uintptr_t address) {
    const uintptr_t key = address / ShadowPage::kBytes;
    Recent& recent = recent_[key % kRecent];
    if (recent.key != key || !recent.page) recent = {key, &pages_[key]};
    return *recent.page;
  }
  size_t size() const { return pages_.size(); }
  void clear() {
    pages_.clear();
    for (Recent& recent : recent_) recent = {};
  }

 private:
  static constexpr size_t kRecent = 256;
  struct Recent {
    uintptr_t key = 0;
    ShadowPage* page = nullptr;
  };
  std::unordered_map<uintptr_t, ShadowPage> pages_;  // elements stay where they are
  Recent recent_[kRecent];
};

}  // namespace dlops::simt
