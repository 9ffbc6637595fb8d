#include "simt/warp.h"

#include <bit>

#include "simt/report.h"
#include "simt/worker.h"

namespace dlops::simt {
namespace {

template <class Payload, class Function>
void for_lanes(unsigned mask, void* const* payloads, Function function) {
  for (unsigned bits = mask; bits; bits &= bits - 1) {
    const unsigned lane = std::countr_zero(bits);
    function(lane, *static_cast<Payload*>(payloads[lane]));
  }
}

struct Shuffle {
  const char* name;
  uint64_t value, result;
  unsigned source;
};

void combine_shuffle(unsigned mask, void* const* payloads) {
  for_lanes<Shuffle>(mask, payloads, [&](unsigned lane, Shuffle& self) {
    if (!(mask >> self.source & 1))
      this_worker->fault(text(self.name, " at ", this_worker->thread().where, ": lane ", lane, " reads lane ",
                              self.source, ", which the mask ", Hex{mask}, " does not name"),
                         this_worker->warp_thread(lane));
    self.result = static_cast<Shuffle*>(payloads[self.source])->value;
  });
}

struct Ballot {
  bool predicate;
  unsigned result;
};

void combine_vote(unsigned mask, void* const* payloads) {
  unsigned result = 0;
  for_lanes<Ballot>(mask, payloads, [&](unsigned lane, Ballot& self) { result |= unsigned(self.predicate) << lane; });
  for_lanes<Ballot>(mask, payloads, [&](unsigned, Ballot& self) { self.result = result; });
}

struct Match {
  uint64_t value;
  unsigned result;
};

void combine_match(unsigned mask, void* const* payloads) {
  for_lanes<Match>(mask, payloads, [&](unsigned, Match& self) {
    self.result = 0;
    for_lanes<Match>(mask, payloads, [&](unsigned lane, const Match& other) {
      self.result |= unsigned(other.value == self.value) << lane;
    });
  });
}

struct Reduce {
  Reduction reduction;
  bool is_signed;
  uint32_t value, result;
};

uint32_t apply(const Reduce& r, uint32_t a, uint32_t b) {
  const bool less = r.is_signed ? int32_t(a) < int32_t(b) : a < b;
  switch (r.reduction) {
    case Reduction::kAdd: return a + b;
    case Reduction::kMin: return less ? a : b;
    case Reduction::kMax: return less ? b : a;
    case Reduction::kAnd: return a & b;
    case Reduction::kOr: return a | b;
    case Reduction::kXor: return a ^ b;
  }
  return 0;
}

void combine_reduce(unsigned mask, void* const* payloads) {
  const unsigned first = std::countr_zero(mask);
  uint32_t result = static_cast<Reduce*>(payloads[first])->value;
  for_lanes<Reduce>(mask & ~(1u << first), payloads,
                    [&](unsigned, const Reduce& self) { result = apply(self, result, self.value); });
  for_lanes<Reduce>(mask, payloads, [&](unsigned, Reduce& self) { self.result = result; });
}

void combine_barrier(unsigned mask, void* const*) { this_worker->warp_ordered(mask); }

}  // namespace

void warp_barrier(unsigned mask, const Where& where) {
  warp_collective("__syncwarp", mask, combine_barrier, nullptr, where);
}

uint64_t shuffle(const char* name, unsigned mask, uint64_t value, unsigned source, const Where& where) {
  Shuffle payload{name, value, 0, source};
  warp_collective(name, mask, combine_shuffle, &payload, where);
  return payload.result;
}

unsigned vote(const char* name, unsigned mask, bool predicate, const Where& where) {
  Ballot payload{predicate, 0};
  warp_collective(name, mask, combine_vote, &payload, where);
  return payload.result;
}

unsigned match(const char* name, unsigned mask, uint64_t value, const Where& where) {
  Match payload{value, 0};
  warp_collective(name, mask, combine_match, &payload, where);
  return payload.result;
}

uint32_t reduce(const char* name, unsigned mask, Reduction reduction, bool is_signed, uint32_t value,
                const Where& where) {
  Reduce payload{reduction, is_signed, value, 0};
  warp_collective(name, mask, combine_reduce, &payload, where);
  return payload.result;
}

}  // namespace dlops::simt
