// The race detector. Two accesses of the same bytes race unless both read, both are atomic, one thread made both, or
// something orders them:
//   - a barrier of the block (__syncthreads and its kin) between them, for threads of one block;
//   - a __syncwarp between them that names both lanes, directly or through others, for threads of one warp. Shuffles
//   and
//     votes exchange values and, as CUDA documents, order no memory.
// Nothing orders plain accesses of different blocks of a launch.
//
// Of the reads of each byte since the last barrier it remembers two, of different warps where there were, and of the
// atomic updates the last: a race with another alone goes unreported.
#pragma once

#include <cstdint>
#include <mutex>
#include <vector>

#include "simt/launch.h"
#include "simt/shadow.h"

namespace dlops::simt {

class SharedMemory;

// A worker's, kept from block to block: times only grow, so that older records need not be cleared.
class RaceDetector {
 public:
  RaceDetector();

  void begin_block(Grid& grid, uint64_t block);
  void end_block();  // compares what the block did to global memory with other blocks

  void block_barrier() { barrier_time_ = ++time_; }
  void warp_barrier(unsigned warp, unsigned lanes);

  void shared_access(const SharedMemory& shared, const void* p, size_t size, Access access, unsigned thread,
                     const void* code);
  void global_access(const void* p, size_t size, Access access, unsigned thread, const void* code);

 private:
  // Within one page; shared names the array, or is null.
  void touch(ShadowPage& page, const void* p, size_t size, Access access, unsigned thread, const void* code,
             const SharedMemory* shared);
  bool races(Record now, Record before) const;

  Grid* grid_ = nullptr;
  uint64_t block_ = 0;
  uint64_t time_ = 0;            // counts the barriers of blocks and warps
  uint64_t block_time_ = 0;      // when the block began
  uint64_t barrier_time_ = 0;    // when all that came before was ordered
  std::vector<uint64_t> known_;  // [thread][lane]: before when the lane of its warp is ordered before the thread
  std::vector<ShadowPage> shared_;
  Shadow global_;
  std::vector<uintptr_t> touched_;  // addresses of the pages of global_ touched since the block began
};

// A launch begins: what blocks of earlier ones did to global memory does not count. Launches run one at a time.
void begin_launch(const Grid& grid);

}  // namespace dlops::simt
