"""Device functions of the fused matrix products: which tile, its loads and stores by TMA or pointers, the epilogues."""

import triton
import triton.language as tl

from .activation import activate
from .linear_tiles import EPILOGUE_BYTES
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
def split_columns(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right half of the tile (BLOCK_M, BLOCK_N)."""
    return tl.split(tl.permute(tl.reshape(tile, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


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


@triton.jit
def end_run(total, acc, k, BLOCK_K: tl.constexpr, RUN: tl.constexpr = 256):
    """(total, acc): full float32 sums runs of RUN products, then the runs; tensor cores round less."""
    if k % RUN == RUN - BLOCK_K:
        total += acc
        acc = tl.zeros_like(acc)
    return total, acc


@triton.jit
def finish(
    acc,
    bias,
    y,
    pre,
    row,
    col,
    M,
    N,
    p0,
    p1,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
):
    """linear_act's epilogue: bias, activation, stores (arguments as linear_act_kernel's)."""
    # Part by part: several tiles of results beside the accumulator would not fit the registers.
    BITS: tl.constexpr = y.dtype.primitive_bitwidth if TMA else y.dtype.element_ty.primitive_bitwidth
    if BLOCK_N * BITS > 8 * EPILOGUE_BYTES:
        left, right = split_columns(acc, BLOCK_M, BLOCK_N)
        HALF: tl.constexpr = BLOCK_N // 2
        finish(left, bias, y, pre, row, col, M, N, p0, p1, ACTIVATION, BLOCK_M, HALF, TMA)
        finish(right, bias, y, pre, row, col + HALF, M, N, p0, p1, ACTIVATION, BLOCK_M, HALF, TMA)
    else:
        acc = add_bias(acc, bias, col, 1, 0, N, BLOCK_N)
        if pre is not None:
            store_tile(pre, acc, row, col, M, N, BLOCK_M, BLOCK_N, TMA)
        store_tile(y, activate(acc, p0, p1, ACTIVATION), row, col, M, N, BLOCK_M, BLOCK_N, TMA)


@triton.jit
def finish_gated(
    acc_gate,
    acc_up,
    bias_gate,
    bias_up,
    y,
    gate,
    up,
    row,
    col,
    M,
    N,
    p0,
    p1,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
):
    """gated_linear's epilogue, in parts as finish's (arguments as gated_linear_kernel's)."""
    BITS: tl.constexpr = y.dtype.primitive_bitwidth if TMA else y.dtype.element_ty.primitive_bitwidth
    if BLOCK_N * BITS > 8 * EPILOGUE_BYTES:
        gate0, gate1 = split_columns(acc_gate, BLOCK_M, BLOCK_N)
        up0, up1 = split_columns(acc_up, BLOCK_M, BLOCK_N)
        HALF: tl.constexpr = BLOCK_N // 2
        finish_gated(
            gate0, up0, bias_gate, bias_up, y, gate, up, row, col, M, N, p0, p1, ACTIVATION, BLOCK_M, HALF, TMA
        )
        finish_gated(
            gate1, up1, bias_gate, bias_up, y, gate, up, row, col + HALF, M, N, p0, p1, ACTIVATION, BLOCK_M, HALF, TMA
        )
    else:
        acc_gate = add_bias(acc_gate, bias_gate, col, 1, 0, N, BLOCK_N)
        acc_up = add_bias(acc_up, bias_up, col, 1, 0, N, BLOCK_N)
        if gate is not None:
            store_tile(gate, acc_gate, row, col, M, N, BLOCK_M, BLOCK_N, TMA)
            store_tile(up, acc_up, row, col, M, N, BLOCK_M, BLOCK_N, TMA)
        store_tile(y, activate(acc_gate, p0, p1, ACTIVATION) * acc_up, row, col, M, N, BLOCK_M, BLOCK_N, TMA)
