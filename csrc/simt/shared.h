// The shared memory of the block that a worker runs: arrays in an arena, with red zones around each of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "simt/runtime.h"

namespace dlops::simt {

constexpr size_t kMaxShared = 99 << 10;   // of a block: what the smallest of the supported chips has
constexpr size_t kMaxUnasked = 48 << 10;  // without cudaFuncSetAttribute, and of declared arrays

class SharedMemory {
 public:
  SharedMemory();
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  // A new block, whose arrays may have `limit` bytes together.
  void begin(size_t dynamic_bytes, size_t limit, int poison);
  void* array(const SharedArray& array);
  void* dynamic() const { return arrays_[0].begin; }

  size_t offset(const void* p) const { return static_cast<const char*>(p) - base_ - kArena; }  // into the arena
  std::string name(const void* p) const;  // "shared array sums, byte 12"
  // What is wrong with an access: "past the end of shared array sums by 4 bytes", or empty.
  std::string outside(const void* p, size_t size) const;

  static constexpr size_t kArena = 256 << 10;

  // The arena, and as much again on either side of it that nothing may touch.
  bool contains(const void* p) const { return size_t(static_cast<const char*>(p) - base_) < 3 * kArena; }

 private:
  static constexpr size_t kRedZone = 1 << 10;
  static constexpr size_t kDynamicAlignment = 16;  // all that CUDA promises

  struct Placed {
    const SharedArray* array;
    char* begin;
    size_t size;
    std::string name() const { return array ? std::string("shared array ") + array->name : "dynamic shared memory"; }
  };
  char* place(const SharedArray* array, size_t size, size_t alignment);

  char* base_;
  char* end_;  // of what is placed, its red zone included
  size_t limit_ = 0;
  int poison_ = 0;
  std::vector<Placed> arrays_;  // the dynamic one first
};

}  // namespace dlops::simt
