// The exponentials of the selective scan alone: four vectors of states at a time, `steps` of them, into L1 cache.
#include "core/math.h"

using namespace dlops;

extern "C" void exponentials(const float* delta, const float* rate, int64_t steps, float* out) {
  constexpr int kCount = 4, kRow = kCount * kLanes, kSegment = 64;
  vfloat rates[kCount], low[kCount], powers[kCount];
  for (int i = 0; i < kCount; ++i) {
    rates[i] = load(rate + i * kLanes, Full{});
    low[i] = rates[i] * 0x1p-25f;
  }
  for (int64_t t = 0; t < steps; ++t) {
    const int64_t row = t % kSegment;
    exp2<true>(load(delta + row * kLanes, Full{}), rates, low, powers);
    for (int i = 0; i < kCount; ++i) store(out + row * kRow + i * kLanes, powers[i], Full{});
  }
}

extern "C" int64_t elements_of_a_step() { return 4 * kLanes; }
