// Shadow memory: who touched each two bytes last. What the race detector compares an access with.
#pragma once

#include <cstdint>
#include <unordered_map>

namespace dlops::simt {

enum class Access { kRead, kWrite, kAtomic };

// One access as 64 bits: when, by which thread of the block, by which code, to which of the two bytes, atomically or
// not. A zero is no access.
class Record {
 public:
  static constexpr uint64_t kMaxTime = (uint64_t{1} << 27) - 1;

  Record() : bits_(0) {}
  Record(uint64_t time, unsigned thread, const void* code, bool atomic);

  uint64_t time() const { return bits_ >> 37; }
  unsigned thread() const { return bits_ >> 27 & 0x3ff; }
  const void* code() const;  // null if it lies too far into the module
  bool atomic() const { return bits_ & kAtomic; }
  Record bytes(unsigned mask) const { return Record(bits_ | mask); }
  Record at(uint64_t time) const { return Record((bits_ & ((uint64_t{1} << 37) - 1)) | time << 37); }

  // Whether the two touch the same bytes and are not both atomic.
  bool collides(Record other) const { return bits_ & other.bits_ & 3 && !(bits_ & other.bits_ & kAtomic); }

 private:
  static constexpr uint64_t kAtomic = 4;
  explicit Record(uint64_t bits) : bits_(bits) {}

  uint64_t bits_;
};

// The records of 1 KiB: for each two bytes the last write and two reads, of different warps if there were any.
struct ShadowPage {
  static constexpr uintptr_t kBytes = 1024, kGranules = kBytes / 2;

  Record written[kGranules];
  Record read[2][kGranules];
  uint64_t listed = 0;  // when the page was last noted as touched
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
