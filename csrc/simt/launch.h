// One launch, shared by the workers that run its blocks, and the process's settings.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "simt/runtime.h"

namespace dlops::simt {

struct Config {
  uint64_t seed = 0;  // of the order in which threads and blocks run
  int poison = 0xff;  // the byte that shared memory is filled with
  bool detect_races = true;
  int threads = 0;  // OS threads for the blocks of a launch; 0: one per CPU
};

Config config();
void configure(const Config& config);

class Grid {
 public:
  Grid(const Launch& launch, const Config& config);

  const Launch& launch;
  const Config config;
  const uint64_t blocks;
  const size_t shared_limit;

  bool next(uint64_t& block);  // the next block to run, as a linear index; false when there is none
  uint3 index(uint64_t block) const;

  void found(std::string finding, bool fatal);  // a fatal one ends the launch
  // A race between two lines of code, told once.
  template <class Tell>
  void found_race(const void* code, const void* other, Tell tell) {
    if (first_time(code, other)) found(tell(), false);
  }
  std::string findings() const;  // a line each

 private:
  bool first_time(const void* code, const void* other);

  std::atomic<uint64_t> next_{0};
  std::atomic<bool> stop_{false};
  uint64_t start_, step_;  // blocks run in the order (start + i * step) % blocks
  std::mutex mutex_;
  std::vector<std::string> findings_;
  std::set<std::pair<const void*, const void*>> races_;
};

}  // namespace dlops::simt
