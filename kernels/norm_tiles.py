"""Launch configurations of the norms, by width: the same on every architecture."""

from typing import NamedTuple

import triton

from .runtime import ALL_REGISTERS


class Tile(NamedTuple):
    rows: int  # rows of one program
    width: int  # columns of one program, the first power of two that holds D
    num_warps: int
    per_sm: int  # programs for each SM (backward: as many as share the rows)

    @property
    def maxnreg(self) -> int | None:
        """All that a thread can have, or the compiler's choice where a block has more threads than that serves."""
        return ALL_REGISTERS if self.num_warps <= 8 else None


# One tile per power of two. 16 to 32 elements a thread keep two to eight 16-byte loads in flight in each.
FORWARD = {w: Tile(max(1, 2048 // w), w, max(4, w // 1024), 1) for w in (2**i for i in range(4, 15))}
FORWARD_CHUNK = Tile(1, 8192, 16, 1)
BACKWARD = {
    w: Tile(max(1, 2048 // w), w, max(4, min(8, w // 256), w // 512), max(1, min(4, 8192 // w)))
    for w in (2**i for i in range(4, 14))
}
BACKWARD_CHUNK = Tile(1, 2048, 4, 4)
BACKWARD_STATS = Tile(1, 8192, 16, 1)
BACKWARD_STAGES = 2  # the next tile's loads are issued while this one is computed


def width_of(D: int) -> int:
    """The power of two whose tile serves rows of D elements."""
    return max(16, triton.next_power_of_2(D))
