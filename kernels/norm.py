"""RMS and layer normalisation of M rows of D elements, forward and backward, each optionally with a residual stream.

Forward: one program per tile of ROWS rows held in registers; beyond MAX_WIDTH one program per row, in chunks, read twice.
Backward: P programs own fixed ranges of rows, write dx and leave fp32 partials of dweight and dbias (reduction.py adds
them); beyond MAX_WIDTH_BACKWARD a first kernel leaves the two sums of each row, and columns are split over programs too.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reduction import sum_partials, sum_rows
from .runtime import FP_FUSION, as_rows, device_of, on_device, rounded, unsupported

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "layer_norm",
    "layer_norm_backward",
    "rms_norm",
    "rms_norm_backward",
    "unsupported",
]


class Tile(NamedTuple):
    rows: int  # rows of one program
    width: int  # columns of one program, the first power of two that holds D
    num_warps: int
    per_sm: int  # programs for each SM (backward: as many as share the rows)


# One tile per power of two. 16 to 32 elements a thread keep two to eight 16-byte loads in flight in each.
FORWARD = {w: Tile(max(1, 2048 // w), w, max(4, w // 1024), 1) for w in (2**i for i in range(4, 15))}
FORWARD_CHUNK = Tile(1, 8192, 16, 1)
BACKWARD = {
    w: Tile(max(1, 2048 // w), w, max(4, min(8, w // 256), w // 512), max(1, min(4, 8192 // w)))
    for w in (2**i for i in range(4, 14))
}
BACKWARD_CHUNK = Tile(1, 2048, 4, 4)
BACKWARD_STATS = Tile(1, 8192, 16, 1)
MAX_WIDTH = max(FORWARD)
MAX_WIDTH_BACKWARD = max(BACKWARD)
BACKWARD_STAGES = 2  # the next tile's loads are issued while this one is computed


@triton.jit
def load_sum(x, residual, offs_x, offs_residual, mask):
    """x, or x + residual rounded to x's dtype (which is what the norm is taken of), in float32."""
    value = tl.load(x + offs_x, mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        value += tl.load(residual + offs_residual, mask=mask, other=0.0).to(tl.float32)
        value = rounded(value, x.dtype.element_ty).to(tl.float32)
    return value


@triton.jit
def store_normed(y, normed, weight, bias, offs_y, cols, mask, col_mask):
    """y = normed * weight + bias, rounded once."""
    if weight is not None:
        normed *= tl.load(weight + cols, mask=col_mask, other=0.0).to(tl.float32)
    if bias is not None:
        normed += tl.load(bias + cols, mask=col_mask, other=0.0).to(tl.float32)
    tl.store(y + offs_y, rounded(normed, y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def norm_kernel(
    x,  # (M, D)
    residual,  # (M, D) added to x first, or None
    weight,  # (D,) or None
    bias,  # (D,) or None
    y,  # (M, D) contiguous
    total,  # (M, D) contiguous: x + residual rounded, None without a residual
    mean,  # (M,) float32, or None: no mean is taken (rms_norm)
    rstd,  # (M,) float32
    M,  # rows
    eps,  # added to the mean square or the variance
    D: tl.constexpr,  # elements of a row
    STRIDE_X: tl.constexpr,  # elements from one row of x to the next
    STRIDE_RESIDUAL: tl.constexpr,  # the same for residual
    ROWS: tl.constexpr,  # rows of one program
    WIDTH: tl.constexpr,  # power of two >= D
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, WIDTH)[None, :]
    col_mask = cols < D
    mask = (rows < M)[:, None] & col_mask
    offs_y = rows[:, None] * D + cols
    value = load_sum(x, residual, rows[:, None] * STRIDE_X + cols, rows[:, None] * STRIDE_RESIDUAL + cols, mask)
    if residual is not None:
        tl.store(total + offs_y, rounded(value, total.dtype.element_ty), mask=mask)
    if mean is not None:
        centre = tl.sum(value, 1) / D
        tl.store(mean + rows, centre, mask=rows < M)
        value = tl.where(col_mask, value - centre[:, None], 0.0)
        rest = tl.sum(value, 1) / D  # what the rounding of a large mean left in every element
        variance = tl.sum(value * value, 1) / D - rest * rest
        value -= rest[:, None]
    else:
        variance = tl.sum(value * value, 1) / D
    scale = tl.rsqrt(variance + eps)
    tl.store(rstd + rows, scale, mask=rows < M)
    store_normed(y, value * scale[:, None], weight, bias, offs_y, cols, mask, col_mask)


@triton.jit(do_not_specialize=["chunks"])
def wide_norm_kernel(
    x,  # (M, D)
    residual,  # (M, D) added to x first, or None
    weight,  # (D,) or None
    bias,  # (D,) or None
    y,  # (M, D) contiguous
    total,  # (M, D) contiguous: x + residual rounded, None without a residual
    mean,  # (M,) float32, or None: no mean is taken (rms_norm)
    rstd,  # (M,) float32
    eps,  # added to the mean square or the variance
    chunks,  # chunks of a row: an argument, lest the compiler unroll them all
    D: tl.constexpr,  # elements of a row, more than WIDTH
    STRIDE_X: tl.constexpr,  # elements from one row of x to the next
    STRIDE_RESIDUAL: tl.constexpr,  # the same for residual
    WIDTH: tl.constexpr,  # columns of one chunk
):
    row = tl.program_id(0).to(tl.int64)
    pivot = 0.0  # a value near the mean, from which all are measured: a large mean then costs no digits
    if mean is not None:
        cols = tl.arange(0, WIDTH)
        value = load_sum(x, residual, row * STRIDE_X + cols, row * STRIDE_RESIDUAL + cols, cols < D)
        pivot += tl.sum(value, 0) / WIDTH
    sums = 0.0
    centre = 0.0  # mean, less the pivot, of the columns seen so far
    squares = 0.0  # of their distances from it
    for chunk in range(chunks):
        start = chunk * WIDTH
        cols = start + tl.arange(0, WIDTH)
        mask = cols < D
        value = load_sum(x, residual, row * STRIDE_X + cols, row * STRIDE_RESIDUAL + cols, mask)
        if residual is not None:
            tl.store(total + row * D + cols, rounded(value, total.dtype.element_ty), mask=mask)
        if mean is not None:  # the chunk's own two-pass variance, joined to that of the columns before (Chan et al.)
            count = tl.minimum(D - start, WIDTH).to(tl.float32)
            sums += tl.sum(value, 0)
            value = tl.where(mask, value - pivot, 0.0)
            chunk_mean = tl.sum(value, 0) / count
            delta = chunk_mean - centre
            value = tl.where(mask, value - chunk_mean, 0.0)
            centre += delta * (count / (start + count))
            squares += delta * delta * (count * (start / (start + count)))
        squares += tl.sum(value * value, 0)
    scale = tl.rsqrt(squares / D + eps)
    tl.store(rstd + row, scale)
    if mean is not None:
        tl.store(mean + row, sums / D)
    for chunk in range(chunks):
        cols = chunk * WIDTH + tl.arange(0, WIDTH)
        mask = cols < D
        value = load_sum(x, residual, row * STRIDE_X + cols, row * STRIDE_RESIDUAL + cols, mask)
        store_normed(y, (value - pivot - centre) * scale, weight, bias, row * D + cols, cols, mask, mask)


@triton.jit(do_not_specialize=["M", "chunks"])
def backward_stats_kernel(
    dy,  # (M, D) gradient of y
    x,  # (M, D) what the norm was taken of
    weight,  # (D,) or None
    mean,  # (M,) float32, or None (rms_norm)
    rstd,  # (M,) float32
    stats,  # (2, M) float32: means over the row of dy weight xhat, and of dy weight
    M,  # rows
    chunks,  # chunks of a row: an argument, lest the compiler unroll them all
    D: tl.constexpr,  # elements of a row
    STRIDE_DY: tl.constexpr,  # elements from one row of dy to the next
    STRIDE_X: tl.constexpr,  # the same for x
    WIDTH: tl.constexpr,  # columns of one chunk
):
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(rstd + row)
    centre = 0.0
    if mean is not None:
        centre = tl.load(mean + row)
    along = tl.zeros((WIDTH,), tl.float32)
    level = tl.zeros((WIDTH,), tl.float32)
    for chunk in range(chunks):
        cols = chunk * WIDTH + tl.arange(0, WIDTH)
        mask = cols < D
        grad = tl.load(dy + row * STRIDE_DY + cols, mask=mask, other=0.0).to(tl.float32)
        value = tl.load(x + row * STRIDE_X + cols, mask=mask, other=0.0).to(tl.float32)
        if weight is not None:
            grad *= tl.load(weight + cols, mask=mask, other=0.0).to(tl.float32)
        along += grad * ((value - centre) * scale)
        level += grad
    tl.store(stats + row, tl.sum(along, 0) / D)
    tl.store(stats + M + row, tl.sum(level, 0) / D)


@triton.jit(do_not_specialize=["M", "tiles"])
def norm_backward_kernel(
    dy,  # (M, D) gradient of y
    x,  # (M, D) what the norm was taken of
    weight,  # (D,) or None
    mean,  # (M,) float32, or None (rms_norm)
    rstd,  # (M,) float32
    dsum,  # (M, D) added to dx, or None
    stats,  # (2, M) float32 from backward_stats_kernel, or None: the tile holds whole rows and sums them itself
    dx,  # (M, D) contiguous, or None: not asked for
    dweight,  # (P, D) float32 partials, or None
    dbias,  # (P, D) float32 partials, or None
    M,  # rows
    tiles,  # tiles of ROWS rows that each program owns
    D: tl.constexpr,  # elements of a row
    STRIDE_DY: tl.constexpr,  # elements from one row of dy to the next
    STRIDE_X: tl.constexpr,  # the same for x
    STRIDE_DSUM: tl.constexpr,  # the same for dsum
    ROWS: tl.constexpr,  # rows of one tile
    WIDTH: tl.constexpr,  # columns of one program
    STAGES: tl.constexpr,  # tiles in flight
):
    cols = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)[None, :]
    col_mask = cols < D
    part = tl.program_id(0).to(tl.int64)
    if weight is not None:
        gain = tl.load(weight + cols, mask=col_mask, other=0.0).to(tl.float32)
    if dweight is not None:
        dweight_acc = tl.zeros((ROWS, WIDTH), tl.float32)
    if dbias is not None:
        dbias_acc = tl.zeros((ROWS, WIDTH), tl.float32)
    for tile in tl.range(0, tiles, num_stages=STAGES):
        rows = (part * tiles + tile) * ROWS + tl.arange(0, ROWS)
        row_mask = rows < M
        mask = row_mask[:, None] & col_mask
        grad = tl.load(dy + rows[:, None] * STRIDE_DY + cols, mask=mask, other=0.0).to(tl.float32)
        xhat = tl.load(x + rows[:, None] * STRIDE_X + cols, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(rstd + rows, mask=row_mask, other=0.0)[:, None]
        if mean is not None:
            xhat -= tl.load(mean + rows, mask=row_mask, other=0.0)[:, None]
        xhat *= scale
        if dbias is not None:
            dbias_acc += grad
        if dweight is not None:
            dweight_acc += grad * xhat
        if dx is not None:
            if weight is not None:
                grad *= gain
            if stats is not None:
                along = tl.load(stats + rows, mask=row_mask, other=0.0)
            else:
                along = tl.sum(grad * xhat, 1) / D
            out = grad - xhat * along[:, None]
            if mean is not None:
                if stats is not None:
                    level = tl.load(stats + M + rows, mask=row_mask, other=0.0)
                else:
                    level = tl.sum(grad, 1) / D
                out -= level[:, None]
            out *= scale
            if dsum is not None:
                out += tl.load(dsum + rows[:, None] * STRIDE_DSUM + cols, mask=mask, other=0.0).to(tl.float32)
            tl.store(dx + rows[:, None] * D + cols, rounded(out, dx.dtype.element_ty), mask=mask)
    if dweight is not None:
        tl.store(dweight + part * D + cols, sum_rows(dweight_acc, ROWS, WIDTH)[None, :], mask=col_mask)
    if dbias is not None:
        tl.store(dbias + part * D + cols, sum_rows(dbias_acc, ROWS, WIDTH)[None, :], mask=col_mask)


def width_of(D: int) -> int:
    """The power of two whose tile serves rows of D elements."""
    return max(16, triton.next_power_of_2(D))


def _forward(x, residual, weight, bias, eps, centred):
    """(y, total or None, mean or None, rstd)."""
    D = x.shape[-1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = None if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    mean = torch.empty_like(rstd) if centred else None
    M = rstd.numel()
    if y.numel() == 0:  # no rows, or rows of nothing, whose mean is 0 / 0
        for stat in (mean, rstd):
            if stat is not None:
                stat.fill_(float("nan"))
        return y, total, mean, rstd
    x, stride_x = as_rows(x, D)
    stride_residual = 0
    if residual is not None:
        residual, stride_residual = as_rows(residual, D)
    weight = weight if weight is None else weight.contiguous()
    bias = bias if bias is None else bias.contiguous()
    # fmt: off
    if D <= MAX_WIDTH:
        tile = FORWARD[width_of(D)]
        norm_kernel[(triton.cdiv(M, tile.rows),)](
            x, residual, weight, bias, y, total, mean, rstd, M, eps, D, stride_x, stride_residual, tile.rows, tile.width,
            num_warps=tile.num_warps, enable_fp_fusion=FP_FUSION,
        )
    else:
        tile = FORWARD_CHUNK
        wide_norm_kernel[(M,)](
            x, residual, weight, bias, y, total, mean, rstd, eps, triton.cdiv(D, tile.width), D, stride_x, stride_residual,
            tile.width,
            num_warps=tile.num_warps, enable_fp_fusion=FP_FUSION,
        )
    # fmt: on
    return y, total, mean, rstd


def _backward(dy, x, weight, mean, rstd, dsum, want_dx, want_dweight, want_dbias):
    """(dx, dweight, dbias), each an empty (0,) tensor where it is not asked for."""
    D, M, device = x.shape[-1], rstd.numel(), x.device
    if x.numel() == 0:
        nothing = [want_dweight, want_dbias]
        dx = torch.empty(x.shape if want_dx else 0, dtype=x.dtype, device=device)
        return dx, *(torch.zeros(D if want else 0, dtype=x.dtype, device=device) for want in nothing)
    shape = x.shape
    dy, stride_dy = as_rows(dy, D)
    x, stride_x = as_rows(x, D)
    stride_dsum = 0
    if dsum is not None:
        dsum, stride_dsum = as_rows(dsum, D)
    weight = weight if weight is None else weight.contiguous()
    dx = torch.empty(shape, dtype=x.dtype, device=device) if want_dx else None

    wide = D > MAX_WIDTH_BACKWARD
    tile = BACKWARD_CHUNK if wide else BACKWARD[width_of(D)]
    col_tiles = triton.cdiv(D, tile.width)
    row_tiles = triton.cdiv(M, tile.rows)
    parts = triton.cdiv(device_of(x).num_sms * tile.per_sm, col_tiles)
    tiles = triton.cdiv(row_tiles, parts)  # of each program
    parts = triton.cdiv(row_tiles, tiles)
    sums = want_dweight + want_dbias
    partials = torch.empty((sums, parts, D), dtype=torch.float32, device=device) if sums else None
    dweight = partials[0] if want_dweight else None
    dbias = partials[-1] if want_dbias else None
    stats = torch.empty((2, M), dtype=torch.float32, device=device) if wide and want_dx else None
    # fmt: off
    if stats is not None:
        backward_stats_kernel[(M,)](
            dy, x, weight, mean, rstd, stats, M, triton.cdiv(D, BACKWARD_STATS.width), D, stride_dy, stride_x,
            BACKWARD_STATS.width,
            num_warps=BACKWARD_STATS.num_warps, enable_fp_fusion=FP_FUSION,
        )
    norm_backward_kernel[(parts, col_tiles)](
        dy, x, weight, mean, rstd, dsum, stats, dx, dweight, dbias, M, tiles, D, stride_dy, stride_x, stride_dsum,
        tile.rows, tile.width, BACKWARD_STAGES,
        num_warps=tile.num_warps, enable_fp_fusion=FP_FUSION,
    )
    # fmt: on
    totals = iter(sum_partials(partials, sums, x.dtype) if sums else ())
    outs = (dx, next(totals) if want_dweight else None, next(totals) if want_dbias else None)
    return tuple(torch.empty(0, dtype=x.dtype, device=device) if out is None else out for out in outs)


@on_device
def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """(y, rstd): x (..., D) over its root mean square, times weight (D,)."""
    y, _, _, rstd = _forward(x, None, weight, None, eps, False)
    return y, rstd


@on_device
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(y, total, rstd): rms_norm of total = x + residual."""
    y, total, _, rstd = _forward(x, residual, weight, None, eps, False)
    return y, total, rstd


@on_device
def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, rstd): x (..., D) less its mean over its standard deviation, times weight (D,), plus bias (D,)."""
    y, _, mean, rstd = _forward(x, None, weight, bias, eps, True)
    return y, mean, rstd


@on_device
def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, total, mean, rstd): layer_norm of total = x + residual."""
    return _forward(x, residual, weight, bias, eps, True)


@on_device
def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, dsum: Tensor | None, output_mask: list[bool]
) -> tuple[Tensor, Tensor]:
    """(dx, dweight) of those asked for; dx includes dsum, the gradient that reaches x past the norm."""
    dx, dweight, _ = _backward(dy, x, weight, None, rstd, dsum, *output_mask, False)
    return dx, dweight


@on_device
def layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dsum: Tensor | None,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias) of those asked for; dx includes dsum, the gradient that reaches x past the norm."""
    return _backward(dy, x, weight, mean, rstd, dsum, *output_mask)
