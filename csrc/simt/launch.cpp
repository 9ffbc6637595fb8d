#include "simt/launch.h"

#include <sched.h>

#include <algorithm>
#include <exception>
#include <numeric>
#include <stdexcept>
#include <thread>
#include <type_traits>

#include "simt/device.h"
#include "simt/race.h"
#include "simt/report.h"
#include "simt/worker.h"

// Where the compiler says that the no-ops of __launch_bounds__ begin.
extern "C" const char* const __start___patchable_function_entries[] __attribute__((weak, visibility("hidden")));
extern "C" const char* const __stop___patchable_function_entries[] __attribute__((weak, visibility("hidden")));

namespace dlops::simt {
namespace {

std::mutex config_mutex;
Config the_config;

constexpr size_t kEnough = 16;    // findings
constexpr int kMostWorkers = 16;  // each maps up to 1024 stacks and their guards, and a process has 65530 maps

// The threads that __launch_bounds__ allows a kernel, or kMaxThreads.
unsigned launch_bound(const void* kernel) {
#if defined(__aarch64__)
  constexpr uint32_t kNoOp = 0xd503201f;
#else
  constexpr uint8_t kNoOp = 0x90;
#endif
  const auto code = static_cast<const std::remove_const_t<decltype(kNoOp)>*>(kernel);
  for (auto begin = __start___patchable_function_entries; begin != __stop___patchable_function_entries; ++begin) {
    const size_t count = (static_cast<const char*>(kernel) - *begin) / sizeof kNoOp;
    if (count - 1 < kMaxThreads && std::count(code - count, code, kNoOp) == ptrdiff_t(count)) return unsigned(count);
  }
  return kMaxThreads;
}

void work(Grid& grid) try {
  Worker worker(grid);
  for (uint64_t block; grid.next(block);) worker.run_block(block);
} catch (const std::exception& error) {
  grid.found(error.what(), true);
}

}  // namespace

Config config() {
  const std::lock_guard lock(config_mutex);
  return the_config;
}

void configure(const Config& config) {
  const std::lock_guard lock(config_mutex);
  the_config = config;
}

Grid::Grid(const Launch& launch, const Config& config)
    : launch(launch),
      config(config),
      blocks(uint64_t(launch.grid.x) * launch.grid.y * launch.grid.z),
      shared_limit(dlops::simt::shared_limit(launch.kernel)) {
  start_ = (config.seed * 0x9e3779b97f4a7c15 >> 32) % blocks;
  step_ = blocks * 5 / 8 + 1;
  while (std::gcd(step_, blocks) != 1) ++step_;
}

bool Grid::next(uint64_t& block) {
  const uint64_t i = next_++;
  if (i >= blocks || stop_) return false;
  block = (start_ + i * step_) % blocks;
  return true;
}

uint3 Grid::index(uint64_t block) const {
  const dim3 grid = launch.grid;
  return {unsigned(block % grid.x), unsigned(block / grid.x % grid.y), unsigned(block / grid.x / grid.y)};
}

void Grid::found(std::string finding, bool fatal) {
  const std::lock_guard lock(mutex_);
  findings_.push_back(std::move(finding));
  if (fatal || findings_.size() == kEnough) stop_ = true;
}

bool Grid::first_time(const void* code, const void* other) {
  const std::lock_guard lock(mutex_);
  return races_.insert(std::minmax(code, other)).second;
}

std::string Grid::findings() const {
  std::string all;
  for (const std::string& finding : findings_) all += (all.empty() ? "" : "\n") + finding;
  return all;
}

void run(const Launch& launch) {
  if (!device_accepts(launch)) return;
  const unsigned threads_per_block = launch.block.x * launch.block.y * launch.block.z;
  if (const unsigned bound = launch_bound(launch.kernel); threads_per_block > bound)
    throw std::runtime_error(text("kernel ", kernel_name(launch), ": launched with ", threads_per_block,
                                  " threads a block, and its __launch_bounds__ are ", bound));
  static std::mutex stream;
  const std::lock_guard lock(stream);
  Grid grid(launch, config());
  begin_launch(grid);
  int threads = grid.config.threads;
  if (threads == 0) {
    cpu_set_t cpus;
    threads = sched_getaffinity(0, sizeof cpus, &cpus) ? 1 : CPU_COUNT(&cpus);
  }
  threads = std::min(threads, kMostWorkers);
  std::vector<std::thread> helpers;
  for (uint64_t i = 1; i < std::min<uint64_t>(threads, grid.blocks); ++i) helpers.emplace_back(work, std::ref(grid));
  work(grid);
  for (std::thread& helper : helpers) helper.join();
  if (const std::string findings = grid.findings(); !findings.empty()) throw std::runtime_error(findings);
}

}  // namespace dlops::simt
