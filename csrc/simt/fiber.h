// Fibers: stacks that a worker switches between by hand, one per CUDA thread of the block it runs.
#pragma once

#include <cstddef>

namespace dlops::simt {

// Where a suspended fiber continues.
struct Fiber {
  void* stack_pointer = nullptr;
  const void* bottom = nullptr;  // of the stack; this and the next two are kept for AddressSanitizer
  size_t size = 0;
  void* fake_stack = nullptr;
};

Fiber this_stack();  // the OS thread's own stack, as a fiber to switch away from

// Suspends `from`, which is running, and continues `to`. A fiber that will not run again passes `last`.
void switch_fiber(Fiber& from, Fiber& to, bool last = false);
void fiber_started();  // the first thing that a fiber's entry calls

// Stacks for the threads of one block, each with a guard page below it, kept for the next block.
class Stacks {
 public:
  Stacks();
  ~Stacks();
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;

  // A fiber on stack i that begins in entry, which must not return.
  Fiber fiber(size_t i, void (*entry)());
  bool contains(const void* p) const { return size_t(static_cast<const char*>(p) - base_) < size_; }

 private:
  char* base_;
  size_t size_;
  size_t guarded_ = 0;  // stacks whose guard page is in place
};

}  // namespace dlops::simt
