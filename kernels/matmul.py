"""Device functions of the fused matrix products: which tile, its loads and stores by TMA or pointers, its product."""

import triton
import triton.language as tl

from .runtime import INTERPRETED, rounded


@triton.jit
def tile_origin(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """First row and column of the tile: GROUP_M rows of tiles are walked column by column."""
    in_group = GROUP_M * tl.cdiv(N, BLOCK_N)
    first_m = tile // in_group * GROUP_M
    rows = tl.minimum(tl.cdiv(M, BLOCK_M) - first_m, GROUP_M)
    return (first_m + tile % in_group % rows) * BLOCK_M, tile % in_group // rows * BLOCK_N


@triton.jit
def load_tile(
    src,
    row,
    col,
    offset,
    num_rows,
    num_cols,
    stride,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    EVEN: tl.constexpr,
    TMA: tl.constexpr,
):
    """src[row:, col:] of the columns from `offset` on; zeros past num_cols, some other row past num_rows."""
    if TMA:
        return src.load([row, offset + col])
    else:
        rows = tl.minimum(row + tl.arange(0, ROWS), num_rows - 1).to(tl.int64)
        cols = col + tl.arange(0, COLS)
        ptrs = src + rows[:, None] * stride + (offset + cols)[None, :]
        if EVEN:
            return tl.load(ptrs)
        else:
            return tl.load(ptrs, mask=(cols < num_cols)[None, :], other=0.0)


@triton.jit
def store_tile(dst, value, row, col, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr):
    """Writes value at [row, col] of the contiguous (M, N) dst, rounded to its dtype."""
    if TMA:
        dst.store([row, col], rounded(value, dst.dtype))
    else:
        rows = row.to(tl.int64) + tl.arange(0, BLOCK_M)
        cols = col + tl.arange(0, BLOCK_N)
        mask = (rows < M)[:, None] & (cols < N)[None, :]
        tl.store(dst + rows[:, None] * N + cols[None, :], rounded(value, dst.dtype.element_ty), mask=mask)


@triton.jit
def add_bias(acc, bias, col, scale: tl.constexpr, offset, N, BLOCK_N: tl.constexpr):
    """acc plus bias[cols * scale + offset] of each column, in float32; acc itself without a bias."""
    if bias is None:
        return acc
    else:
        cols = col + tl.arange(0, BLOCK_N)
        return acc + tl.load(bias + cols * scale + offset, mask=cols < N, other=0.0).to(tl.float32)[None, :]


@triton.jit
def multiply_add(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b^T. The interpreter multiplies bfloat16 as raw integers: it gets float32, where products are exact."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), tl.trans(b.to(tl.float32)), acc)
    else:
        return tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
