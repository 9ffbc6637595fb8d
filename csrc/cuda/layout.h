// How rows are spread over the threads of a block.
#pragma once

#include <cstdint>

namespace dlops::cuda {

// blockDim.x threads share a row, blockDim.y rows share a block.
struct RowLayout {
  int threads, rows;
};

// Whether no block has more than `threads`.
template <int N>
constexpr bool fits(const RowLayout (&layouts)[N], int threads) {
  for (const RowLayout& layout : layouts)
    if (layout.threads * layout.rows > threads) return false;
  return true;
}

// Adjacent threads whose packs of kVec elements follow each other: of a 128-byte line, or of a warp where packs are
// single elements. A row has at least so many.
template <int kVec>
constexpr int kGroup = kVec == 1 ? 32 : 8;

// The first layout whose threads hold `width` elements, per_thread each; where none does, the last.
template <int kVec, int N>
constexpr RowLayout layout_for(const RowLayout (&layouts)[N], int64_t width, int per_thread) {
  for (const RowLayout& layout : layouts)
    if (layout.threads >= kGroup<kVec> && width <= int64_t(layout.threads) * per_thread) return layout;
  return layouts[N - 1];
}

}  // namespace dlops::cuda
