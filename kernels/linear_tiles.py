"""Launch configurations of the fused linear kernels: a pure function of shape, arithmetic, architecture and SMs."""

import functools
from typing import NamedTuple

import triton
import triton.language as tl


class Tile(NamedTuple):
    block_m: int  # rows of y
    block_n: int  # columns of y
    block_k: int  # inner elements of one step
    num_warps: int
    num_stages: int  # steps in flight
    per_sm: int  # persistent programs for each SM


# Per architecture and arithmetic, largest tile first. "half" is 16-bit; float32 is "tf32" or "ieee", as torch's
# setting says. The 16- and 32-row tiles are for decoding: they only have to keep enough bytes of the weight in flight.
_IEEE = (
    Tile(64, 64, 16, 4, 3, 2),
    Tile(32, 32, 32, 4, 3, 4),
    Tile(16, 32, 32, 4, 4, 4),
)
_FEW_ROWS = (
    Tile(32, 64, 128, 4, 3, 2),
    Tile(32, 32, 128, 4, 4, 2),
    Tile(16, 64, 128, 4, 4, 2),
    Tile(16, 32, 256, 4, 3, 2),
    Tile(16, 16, 256, 4, 4, 2),
)
_FEW_ROWS_TF32 = (
    Tile(32, 64, 64, 4, 3, 2),
    Tile(32, 32, 64, 4, 4, 2),
    Tile(16, 64, 64, 4, 4, 2),
    Tile(16, 32, 64, 4, 5, 2),
)
TILES = {
    80: {
        "half": (
            Tile(128, 128, 32, 8, 4, 2),
            Tile(64, 128, 32, 4, 4, 2),
            Tile(64, 64, 64, 4, 3, 3),
            *_FEW_ROWS[:3],
            Tile(16, 32, 128, 4, 3, 2),  # the wider one spills
            _FEW_ROWS[4],
        ),
        "tf32": (
            Tile(128, 128, 32, 8, 3, 1),
            Tile(64, 128, 32, 4, 3, 2),
            Tile(64, 64, 32, 4, 3, 3),
            *_FEW_ROWS_TF32,
        ),
        "ieee": _IEEE,
    },
    90: {
        "half": (
            Tile(128, 256, 64, 8, 3, 1),
            Tile(128, 128, 64, 8, 4, 1),
            Tile(64, 128, 64, 4, 4, 2),
            Tile(64, 64, 64, 4, 4, 3),
            *_FEW_ROWS,
        ),
        "tf32": (
            Tile(128, 128, 32, 8, 4, 1),
            Tile(64, 128, 32, 4, 4, 2),
            Tile(64, 64, 32, 4, 4, 3),
            *_FEW_ROWS_TF32,
        ),
        "ieee": _IEEE,
    },
    100: {
        "half": (
            Tile(128, 256, 64, 8, 3, 1),
            Tile(128, 128, 64, 8, 4, 1),
            Tile(128, 64, 64, 8, 4, 2),
            Tile(64, 64, 64, 4, 4, 3),
            *_FEW_ROWS,
        ),
        "tf32": (
            Tile(128, 256, 32, 8, 3, 1),
            Tile(128, 64, 32, 8, 4, 2),
            Tile(64, 64, 64, 4, 3, 2),
            *_FEW_ROWS_TF32,
        ),
        "ieee": _IEEE,
    },
    120: {
        "half": (
            Tile(128, 128, 32, 8, 4, 1),
            Tile(64, 128, 32, 4, 4, 1),
            Tile(64, 64, 64, 4, 3, 2),
            *_FEW_ROWS,
        ),
        "tf32": (
            Tile(128, 128, 16, 8, 3, 1),
            Tile(64, 128, 16, 4, 3, 2),
            Tile(64, 64, 32, 4, 3, 2),
            *_FEW_ROWS_TF32,
        ),
        "ieee": _IEEE,
    },
}
GROUP_M = 8  # rows of tiles that are walked together, so that they share the weight's columns in the L2 cache
EPILOGUE_BYTES = tl.constexpr(128)  # of a row of a tile, that the epilogue takes at a time: TMA's widest swizzle
MAX_POINTER_TILE = 128 * 128  # larger tiles come by TMA only: the addresses of the others fill the registers
MAX_BLOCK_K = 64  # of the tiles that come by TMA
TMA_ARCH = 90  # the first with bulk tensor copies
TMA_MIN_ROWS = 64
TMA_MIN_WORK = 2**30  # M N K: below, encoding the descriptors on the host costs more than they save


def arch_of(arch: int) -> int:
    """The newest architecture with a table that is not newer than this one."""
    return max((known for known in TILES if known <= arch), default=min(TILES))


def may_use_tma(arithmetic: str, arch: int) -> bool:
    """Whether the tables have tiles that come by TMA: full float32 is bound by its arithmetic."""
    return arch >= TMA_ARCH and arithmetic != "ieee"


def gated(tile: Tile) -> Tile:
    """The tile for two accumulators: half the columns of each."""
    return tile._replace(block_n=max(16, tile.block_n // 2))


def maxout(tile: Tile) -> Tile:
    """The tile for an accumulator, the best so far and its index."""
    return tile._replace(block_n=max(16, tile.block_n // 4 if tile.block_n > 128 else tile.block_n // 2))


SHAPED = {"linear": lambda tile: tile, "gated": gated, "maxout": maxout}


def tiles_of(kind: str, arithmetic: str, arch: int, tma: bool) -> list[Tile]:
    """The table of one kernel, largest tile first; by TMA also the tiles too large for pointers, none of few rows."""
    fits = [t for t in TILES[arch_of(arch)][arithmetic] if tma or t.block_m * t.block_n <= MAX_POINTER_TILE]
    return [SHAPED[kind](tile) for tile in fits if not tma or tile.block_m >= TMA_MIN_ROWS]


@functools.lru_cache(maxsize=4096)
def tile_for(kind: str, arithmetic: str, M: int, N: int, arch: int, num_sms: int, tma: bool) -> Tile:
    """The largest tile no taller than M that gives every SM work, else the one that gives work to most."""
    rows = max(TMA_MIN_ROWS if tma else 16, triton.next_power_of_2(M))
    tiles = [t for t in tiles_of(kind, arithmetic, arch, tma) if min(rows, 32) <= t.block_m <= rows]

    def count(tile: Tile) -> int:
        return triton.cdiv(M, tile.block_m) * triton.cdiv(N, tile.block_n)

    return next((tile for tile in tiles if count(tile) >= num_sms), max(tiles, key=count))
