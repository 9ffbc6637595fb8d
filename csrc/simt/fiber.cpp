#include "simt/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <pthread.h>
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace dlops::simt {
namespace {

constexpr size_t kGuard = 64 << 10, kStack = 128 << 10, kSlot = kGuard + kStack;  // whole pages of any usual size
constexpr size_t kMaxStacks = 1024;
// Stacks a power of two apart would share a few sets of every cache: each begins a little lower than the last.
constexpr size_t kColours = 32, kColour = 192;

// What dlops_simt_switch pops, in words, and where among them it finds the address to continue at.
#if defined(__x86_64__)
constexpr size_t kFrame = 8, kEntry = 6;  // the last is a return address for the entry: none
#else
constexpr size_t kFrame = 20, kEntry = 11;
#endif

}  // namespace
}  // namespace dlops::simt

// Saves what a call must preserve on the current stack, stores the stack pointer in *from, and continues at `to`.
extern "C" void dlops_simt_switch(void** from, void* to);

#if defined(__x86_64__)
asm(R"(
  .pushsection .text
  .hidden dlops_simt_switch
  .globl dlops_simt_switch
  .type dlops_simt_switch, @function
dlops_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size dlops_simt_switch, . - dlops_simt_switch
  .popsection
)");
#elif defined(__aarch64__)
asm(R"(
  .pushsection .text
  .hidden dlops_simt_switch
  .globl dlops_simt_switch
  .type dlops_simt_switch, %function
dlops_simt_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
  .size dlops_simt_switch, . - dlops_simt_switch
  .popsection
)");
#else
#error "csrc/simt/fiber.cpp knows x86-64 and aarch64; DLOPS_BUILD_SIMT=0 builds without it"
#endif

namespace dlops::simt {

#if defined(__SANITIZE_ADDRESS__)

Fiber this_stack() {
  Fiber fiber;
  pthread_attr_t attributes;
  void* bottom = nullptr;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &bottom, &fiber.size);
  pthread_attr_destroy(&attributes);
  fiber.bottom = bottom;
  return fiber;
}

void switch_fiber(Fiber& from, Fiber& to, bool last) {
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, to.bottom, to.size);
  dlops_simt_switch(&from.stack_pointer, to.stack_pointer);
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
}

void fiber_started() { __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr); }

#else

Fiber this_stack() { return {}; }

void switch_fiber(Fiber& from, Fiber& to, bool) { dlops_simt_switch(&from.stack_pointer, to.stack_pointer); }

void fiber_started() {}

#endif

Stacks::Stacks() : size_(kMaxStacks * kSlot) {
  void* p = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  base_ = static_cast<char*>(p);
}

Stacks::~Stacks() { munmap(base_, size_); }

Fiber Stacks::fiber(size_t i, void (*entry)()) {
  char* slot = base_ + i * kSlot;
  for (; guarded_ <= i; ++guarded_)
    if (mprotect(base_ + guarded_ * kSlot, kGuard, PROT_NONE)) throw std::bad_alloc();
  Fiber fiber{nullptr, slot + kGuard, kStack, nullptr};
  char* top = slot + kSlot - i % kColours * kColour;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(fiber.bottom, kStack);  // a block that failed left its frames behind
#endif
  void** frame = reinterpret_cast<void**>(top) - kFrame;
  for (size_t k = 0; k < kFrame; ++k) frame[k] = nullptr;  // a debugger's backtrace ends at a null frame
  frame[kEntry] = reinterpret_cast<void*>(entry);
  fiber.stack_pointer = frame;
  return fiber;
}

}  // namespace dlops::simt
