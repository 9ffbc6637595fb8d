#include "simt/atomics.h"

#include <algorithm>
#include <atomic>

#include "simt/report.h"
#include "simt/worker.h"

namespace dlops::simt {
namespace {

template <class T>
T apply(Atomic operation, T old, T value) {
  if constexpr (std::is_integral_v<T>) {
    switch (operation) {
      case Atomic::kAnd: return old & value;
      case Atomic::kOr: return old | value;
      case Atomic::kXor: return old ^ value;
      default: break;
    }
  }
  switch (operation) {
    case Atomic::kAdd: return T(old + value);
    case Atomic::kMin: return std::min(old, value);
    case Atomic::kMax: return std::max(old, value);
    case Atomic::kIncrement: return old >= value ? T(0) : T(old + 1);
    case Atomic::kDecrement: return old == 0 || old > value ? value : T(old - 1);
    default: return value;
  }
}

void access(const void* p, size_t size, const void* code) {
  if (reinterpret_cast<uintptr_t>(p) % size)
    fault(text("misaligned atomic update: ", p, " is not aligned to ", size, " bytes, at ", source_line(code)));
  this_worker->access(p, size, Access::kAtomic, code);
}

}  // namespace

template <class T>
T atomic(Atomic operation, T* p, T value) {
  access(p, sizeof(T), __builtin_return_address(0));
  std::atomic_ref<T> target(*p);
  T old = target.load();
  while (!target.compare_exchange_weak(old, apply(operation, old, value))) {
  }
  return old;
}

template <class T>
T atomic_compare_exchange(T* p, T expected, T value) {
  access(p, sizeof(T), __builtin_return_address(0));
  std::atomic_ref<T>(*p).compare_exchange_strong(expected, value);
  return expected;
}

void fence() { std::atomic_thread_fence(std::memory_order_seq_cst); }

template int atomic(Atomic, int*, int);
template unsigned atomic(Atomic, unsigned*, unsigned);
template unsigned long long atomic(Atomic, unsigned long long*, unsigned long long);
template float atomic(Atomic, float*, float);
template double atomic(Atomic, double*, double);
template int atomic_compare_exchange(int*, int, int);
template unsigned atomic_compare_exchange(unsigned*, unsigned, unsigned);
template unsigned long long atomic_compare_exchange(unsigned long long*, unsigned long long, unsigned long long);

}  // namespace dlops::simt
