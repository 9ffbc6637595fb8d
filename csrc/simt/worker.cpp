#include "simt/worker.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <mutex>
#include <utility>

#include "simt/race.h"
#include "simt/report.h"
#include "simt/shared.h"

namespace dlops::simt {
namespace {

uint64_t scramble(uint64_t x) {  // splitmix64
  x += 0x9e3779b97f4a7c15;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
  x = (x ^ x >> 27) * 0x94d049bb133111eb;
  return x ^ x >> 31;
}

constexpr const char* kVerbs[] = {"read", "write", "atomic update"};  // by Access

}  // namespace

constinit thread_local Worker* this_worker = nullptr;

void fault(const std::string& what) { this_worker->fault(what, this_worker->thread()); }

uint3 thread_index(const Launch& launch, unsigned id) {
  const dim3 size = launch.block;
  return {id % size.x, id / size.x % size.y, id / size.x / size.y};
}

// ---- what a worker needs whichever block it runs, handed on to later workers
// -----------------------------------------

struct Worker::Memory {
  Stacks stacks;
  SharedMemory shared;
  RaceDetector races;

  static std::unique_ptr<Memory> take() {
    const std::lock_guard lock(mutex);
    if (spare.empty()) return std::make_unique<Memory>();
    auto memory = std::move(spare.back());
    spare.pop_back();
    return memory;
  }
  static void put_back(std::unique_ptr<Memory> memory) {
    const std::lock_guard lock(mutex);
    spare.push_back(std::move(memory));
  }

  static inline std::mutex mutex;
  static inline std::vector<std::unique_ptr<Memory>> spare;
};

Worker::Worker(Grid& grid) : grid_(grid), memory_(Memory::take()), main_(this_stack()) {
  const dim3 block = grid.launch.block;
  threads_.resize(size_t(block.x) * block.y * block.z);
  warps_.resize((threads_.size() + kWarpSize - 1) / kWarpSize);
  this_worker = this;
}

Worker::~Worker() {
  this_worker = nullptr;
  Memory::put_back(std::move(memory_));
}

SharedMemory& Worker::shared() { return memory_->shared; }

// ---- running a block
// -------------------------------------------------------------------------------------------------

void Worker::run_block(uint64_t block) {
  block_index_ = grid_.index(block);
  random_ = scramble(scramble(grid_.config.seed) ^ block);
  memory_->shared.begin(grid_.launch.shared_bytes, grid_.shared_limit, grid_.config.poison);
  memory_->races.begin_block(grid_, block);
  start_threads();
  thread_ = next();
  switch_fiber(main_, thread_->fiber);
  if (fault_.empty() && returned_ < threads_.size()) fault_ = diagnose();
  if (fault_.empty())
    memory_->races.end_block();
  else
    grid_.found(std::exchange(fault_, {}), true);
}

void Worker::start_threads() {
  for (unsigned id = 0; id < threads_.size(); ++id) {
    Thread& thread = threads_[id];
    thread = {.fiber = memory_->stacks.fiber(id, thread_entry), .index = thread_index(grid_.launch, id), .id = id};
  }
  for (size_t w = 0; w < warps_.size(); ++w) {
    const size_t lanes = std::min<size_t>(kWarpSize, threads_.size() - w * kWarpSize);
    warps_[w].exists = warps_[w].ready = ~0u >> (kWarpSize - lanes);
    warps_[w].meetings.clear();
  }
  ready_warps_ = ~0u >> (kMaxThreads / kWarpSize - warps_.size());
  warp_ = pick(ready_warps_);
  returned_ = at_barrier_ = 0;
}

void Worker::thread_entry() {
  fiber_started();
  Worker& worker = *this_worker;
  worker.grid_.launch.call(worker.grid_.launch.arguments);
  Thread& self = *worker.thread_;
  self.returned = true;
  ++worker.returned_;
  worker.thread_ = worker.next();
  switch_fiber(self.fiber, worker.thread_ ? worker.thread_->fiber : worker.main_, true);
}

void Worker::fault(std::string what, const Thread& by) {
  fault_ = text("kernel ", kernel_name(grid_.launch), ", block ", block_index_, ", thread ", by.index, ": ", what);
  switch_fiber(thread_->fiber, main_, true);
  __builtin_unreachable();
}

// ---- which thread runs
// ------------------------------------------------------------------------------------------------

// One of the bits set, at random.
unsigned Worker::pick(unsigned bits) {
  random_ ^= random_ << 13;
  random_ ^= random_ >> 7;
  random_ ^= random_ << 17;
  const int turn = int(random_ % 32);
  return (std::countr_zero(std::rotr(bits, turn)) + turn) % 32;
}

Thread* Worker::next() {
  if (!warps_[warp_].ready) {
    if (!ready_warps_) return nullptr;
    warp_ = pick(ready_warps_);
  }
  Warp& warp = warps_[warp_];
  const unsigned lane = pick(warp.ready);
  warp.ready &= ~(1u << lane);
  if (!warp.ready) ready_warps_ &= ~(1u << warp_);
  return &threads_[warp_ * kWarpSize + lane];
}

void Worker::wake(unsigned warp, unsigned lanes) {
  warps_[warp].ready |= lanes;
  ready_warps_ |= 1u << warp;
}

// The running thread waits, or goes on at once if it is picked. Nobody to go on is for run_block to explain.
void Worker::wait() {
  Thread& self = *thread_;
  thread_ = next();
  if (thread_ == &self) return;
  switch_fiber(self.fiber, thread_ ? thread_->fiber : main_);
}

// ---- meeting
// ------------------------------------------------------------------------------------------------------------

int Worker::block_barrier(const char* name, Vote vote, int predicate, const Where& where) {
  Thread& self = *thread_;
  self.waits_in = name;
  self.where = where;
  self.vote = predicate != 0;
  if (at_barrier_ == 0) first_at_barrier_ = &self;
  const Where& there = first_at_barrier_->where;
  if (name != first_at_barrier_->waits_in || where.line() != there.line() ||
      std::strcmp(where.file_name(), there.file_name()))
    simt::fault(text("divergent barrier: ", name, " at ", where, " while thread ", first_at_barrier_->index,
                     " waits in ", first_at_barrier_->waits_in, " at ", there));
  if (++at_barrier_ == threads_.size()) {
    int count = 0;
    for (const Thread& thread : threads_) count += thread.vote;
    const int result = vote == Vote::kCount ? count : vote == Vote::kAnd ? count == int(threads_.size()) : count > 0;
    memory_->races.block_barrier();
    for (Thread& thread : threads_) {
      thread.vote = result;
      thread.waits_in = nullptr;
      copies_go_on(thread);
    }
    for (unsigned w = 0; w < warps_.size(); ++w) wake(w, warps_[w].exists);
    at_barrier_ = 0;
  }
  wait();
  return self.vote;
}

void Worker::warp_collective(const char* name, unsigned mask, Combine combine, void* payload, const Where& where) {
  Thread& self = *thread_;
  const unsigned w = self.id / kWarpSize, lane = self.id % kWarpSize;
  if (!(mask >> lane & 1))
    simt::fault(text(name, " at ", where, ": the mask ", Hex{mask}, " does not name the calling lane ", lane));
  self.waits_in = name;
  self.where = where;
  self.payload = payload;
  auto& meetings = warps_[w].meetings;
  size_t i = 0;
  while (i < meetings.size() && (meetings[i].mask != mask || std::strcmp(meetings[i].name, name))) ++i;
  if (i == meetings.size()) meetings.push_back({name, mask, 0});
  meetings[i].arrived |= 1u << lane;
  if (meetings[i].arrived == mask) {
    meetings[i] = meetings.back();
    meetings.pop_back();
    void* payloads[kWarpSize];
    Thread* lanes = &threads_[w * kWarpSize];
    for (unsigned bits = mask; bits; bits &= bits - 1) {
      const int l = std::countr_zero(bits);
      payloads[l] = lanes[l].payload;
      lanes[l].waits_in = nullptr;
    }
    combine(mask, payloads);
    wake(w, mask);
  }
  wait();
}

void Worker::warp_ordered(unsigned lanes) {
  memory_->races.warp_barrier(thread_->id / kWarpSize, lanes);
  for (unsigned bits = lanes; bits; bits &= bits - 1) copies_go_on(warp_thread(std::countr_zero(bits)));
}

// ---- memory
// -------------------------------------------------------------------------------------------------------------

const Copy* Copies::disturbed(const void* p, size_t size, Access access) const {
  const char* begin = static_cast<const char*>(p);
  const auto overlaps = [&](const void* other, size_t bytes) {
    const char* from = static_cast<const char*>(other);
    return begin < from + bytes && from < begin + size;
  };
  for (const Copy& copy : pending)
    if (overlaps(copy.shared, copy.bytes) || (access != Access::kRead && overlaps(copy.global, copy.valid)))
      return &copy;
  return nullptr;
}

void Worker::copies_go_on(const Thread& thread) {
  if (!grid_.config.detect_races) return;
  for (const Copy& copy : thread.copies.pending) {
    memory_->races.global_access(copy.global, copy.valid, Access::kRead, thread.id, copy.code);
    memory_->races.shared_access(memory_->shared, copy.shared, copy.bytes, Access::kWrite, thread.id, copy.code);
  }
}

void Worker::access(const void* p, size_t size, Access access, const void* code) {
  if (memory_->stacks.contains(p)) return;  // a thread's own variables
  check_copies(p, size, access, code);
  access_by(thread_->id % kWarpSize, p, size, access, code);
}

void Worker::check_copies(const void* p, size_t size, Access access, const void* code) {
  if (const Copies& copies = thread_->copies; !copies.pending.empty()) [[unlikely]]
    if (const Copy* copy = copies.disturbed(p, size, access))
      simt::fault(text(kVerbs[int(access)], " of ", size, " bytes, by ", source_line(code),
                       ", of what the copy_async at ", source_line(copy->code),
                       access == Access::kRead ? " writes" : " reads or writes", " and nobody has waited for"));
}

void Worker::access_by(unsigned lane, const void* p, size_t size, Access access, const void* code) {
  const unsigned thread = warp_thread(lane).id;
  const SharedMemory& shared = memory_->shared;
  if (!shared.contains(p)) {
    if (grid_.config.detect_races) memory_->races.global_access(p, size, access, thread, code);
    return;
  }
  if (const std::string wrong = shared.outside(p, size); !wrong.empty()) [[unlikely]]
    fault(text(kVerbs[int(access)], " of ", size, " bytes ", wrong, ", by ", source_line(code)), warp_thread(lane));
  if (grid_.config.detect_races) memory_->races.shared_access(shared, p, size, access, thread, code);
}

// ---- diagnosis
// -----------------------------------------------------------------------------------------------------------

// Why no thread can go on although some have not returned.
std::string Worker::diagnose() const {
  const auto state = [](const Thread& thread) {
    return thread.returned ? std::string("has returned") : text("waits in ", thread.waits_in, " at ", thread.where);
  };
  const std::string place = text("kernel ", kernel_name(grid_.launch), ", block ", block_index_, ", thread ");
  for (size_t w = 0; w < warps_.size(); ++w)
    for (const Meeting& meeting : warps_[w].meetings) {
      const Thread* lanes = &threads_[w * kWarpSize];
      const Thread& waits = lanes[std::countr_zero(meeting.arrived)];
      const int missing = std::countr_zero(meeting.mask & ~meeting.arrived);
      return text(place, waits.index, ": divergent ", waits.waits_in, " at ", waits.where, ": the mask ",
                  Hex{meeting.mask}, " names lane ", missing, ", ",
                  warps_[w].exists >> missing & 1
                      ? text("but thread ", lanes[missing].index, " ", state(lanes[missing]))
                      : std::string("which the block does not have"));
    }
  for (const Thread& thread : threads_)
    if (thread.returned)
      return text(place, first_at_barrier_->index, ": ", first_at_barrier_->waits_in, " at ", first_at_barrier_->where,
                  " is never reached by thread ", thread.index, ", which has returned");
  return text(place, threads_[0].index, ": ", state(threads_[0]), " for ever");
}

// ---- what kernels call
// --------------------------------------------------------------------------------------------------

uint3 thread_idx() { return this_worker->thread().index; }
uint3 block_idx() { return this_worker->block_index(); }
dim3 block_dim() { return this_worker->launch().block; }
dim3 grid_dim() { return this_worker->launch().grid; }
unsigned lane() { return this_worker->thread().id % kWarpSize; }
void* shared_array(const SharedArray& array) { return this_worker->shared().array(array); }
void* dynamic_shared() { return this_worker->shared().dynamic(); }
int block_barrier(const char* name, Vote vote, int predicate, const Where& where) {
  return this_worker->block_barrier(name, vote, predicate, where);
}
void warp_collective(const char* name, unsigned mask, Combine combine, void* payload, const Where& where) {
  this_worker->warp_collective(name, mask, combine, payload, where);
}

}  // namespace dlops::simt
