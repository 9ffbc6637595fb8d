// A worker: an OS thread running one block at a time, each thread of the block on a fiber.
//
// A thread runs until it waits in a barrier or a warp collective, or returns. Then another one that can run continues:
// one of the same warp while there is one, else of another warp, at random, seeded per block. So a warp gets as far
// ahead of the others as the barriers allow, and a lane of the rest of its warp.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "simt/fiber.h"
#include "simt/launch.h"
#include "simt/runtime.h"
#include "simt/shadow.h"

namespace dlops::simt {

constexpr unsigned kWarpSize = 32, kMaxThreads = 1024;

class SharedMemory;

// What copy_async has begun and nobody has waited for.
struct Copy {
  void* shared;
  const void* global;
  size_t bytes, valid;
  unsigned group;
  const void* code;
};

struct Copies {
  std::vector<Copy> pending;
  unsigned groups = 0;  // committed

  // The one that a thread's own access to [p, p + size) gets in the way of, or null.
  const Copy* disturbed(const void* p, size_t size, Access access) const;
};

struct Thread {
  Fiber fiber;
  uint3 index;
  unsigned id;  // in the block, x fastest
  bool returned = false;
  const char* waits_in = nullptr;  // a barrier or a warp collective
  Where where{};
  void* payload = nullptr;  // to the collective
  int vote = 0;             // to the barrier, and its result
  Copies copies{};
};

// The lanes that have arrived in one collective.
struct Meeting {
  const char* name;
  unsigned mask, arrived;
};

struct Warp {
  unsigned exists = 0, ready = 0;  // lanes
  std::vector<Meeting> meetings;
};

class Worker {
 public:
  explicit Worker(Grid& grid);
  ~Worker();

  void run_block(uint64_t block);  // what goes wrong is for the grid's findings

  Thread& thread() { return *thread_; }
  Thread& warp_thread(unsigned lane) {
    return threads_[thread_->id / kWarpSize * kWarpSize + lane];
  }  // of the same warp
  uint3 block_index() const { return block_index_; }
  const Launch& launch() const { return grid_.launch; }
  SharedMemory& shared();

  int block_barrier(const char* name, Vote vote, int predicate, const Where& where);
  void warp_collective(const char* name, unsigned mask, Combine combine, void* payload, const Where& where);
  // The running thread is about to touch memory.
  void access(const void* p, size_t size, Access access, const void* code);
  void check_copies(const void* p, size_t size, Access access, const void* code);  // none of its own is in the way
  void access_by(unsigned lane, const void* p, size_t size, Access access, const void* code);  // of the same warp
  void warp_ordered(unsigned lanes);                                                           // a barrier among them
  [[noreturn]] void fault(std::string what, const Thread& by);  // gives the running block up

 private:
  struct Memory;

  static void thread_entry();
  void start_threads();
  unsigned pick(unsigned bits);
  Thread* next();
  void wake(unsigned warp, unsigned lanes);
  void wait();
  void copies_go_on(const Thread& thread);  // past a barrier: what it copies is read and written after it as before
  std::string diagnose() const;

  Grid& grid_;
  std::unique_ptr<Memory> memory_;
  Fiber main_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;

  // Of the block that runs:
  uint3 block_index_{};
  Thread* thread_ = nullptr;                // runs
  unsigned ready_warps_ = 0, warp_ = 0;     // those with ready lanes; the one whose lanes are picked
  unsigned returned_ = 0, at_barrier_ = 0;  // threads
  const Thread* first_at_barrier_ = nullptr;
  uint64_t random_ = 0;
  std::string fault_;
};

extern constinit thread_local Worker* this_worker __attribute__((tls_model("initial-exec")));  // null outside a kernel
uint3 thread_index(const Launch& launch, unsigned id);
[[noreturn]] void fault(const std::string& what);  // by the running thread

}  // namespace dlops::simt
