#include "simt/math.h"

#include <climits>

// Calls, so that no caller's multiplication and addition meet in one expression.
float __fmul_rn(float a, float b) { return a * b; }
float __fadd_rn(float a, float b) { return a + b; }
float __fsub_rn(float a, float b) { return a - b; }

int __float2int_rz(float x) {  // NaN becomes 0, what is out of range the nearest there is
  if (x != x) return 0;
  return x >= 0x1p31f ? INT_MAX : x < -0x1p31f ? INT_MIN : int(x);
}

unsigned __brev(unsigned x) {
  unsigned result = 0;
  for (int i = 0; i < 32; ++i) result |= (x >> i & 1) << (31 - i);
  return result;
}

unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned choice = selector >> 4 * i;
    const unsigned byte = unsigned(bytes >> 8 * (choice & 7)) & 0xff;
    result |= (choice & 8 ? (byte & 0x80 ? 0xff : 0) : byte) << 8 * i;
  }
  return result;
}
