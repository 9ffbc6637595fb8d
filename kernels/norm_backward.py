"""Gradients of the norms of M rows of D elements.

P programs own fixed ranges of rows, write dx and leave float32 partials of dweight and dbias (reduction.py adds them).
Beyond MAX_WIDTH a first kernel leaves the two sums of each row, and columns are split over programs too.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .norm_tiles import BACKWARD, BACKWARD_CHUNK, BACKWARD_STAGES, BACKWARD_STATS, width_of
from .reduction import sum_partials, sum_rows
from .runtime import FP_FUSION, as_rows, device_of, on_device, rounded

MAX_WIDTH = max(BACKWARD)


@triton.jit(do_not_specialize=["M", "chunks"])
def backward_stats_kernel(
    dy,  # (M, D) gradient of y
    x,  # (M, D) what the norm was taken of
    weight,  # (D,) or None
    mean,  # (M,) float32, or None (rms_norm)
    rstd,  # (M,) float32
    stats,  # (3, M) float32: means over the row of dy weight xhat, of dy weight, of xhat (what rounding left of it)
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
    shift = tl.zeros((WIDTH,), tl.float32)
    for chunk in range(chunks):
        cols = chunk * WIDTH + tl.arange(0, WIDTH)
        mask = cols < D
        grad = tl.load(dy + row * STRIDE_DY + cols, mask=mask, other=0.0).to(tl.float32)
        value = tl.load(x + row * STRIDE_X + cols, mask=mask, other=0.0).to(tl.float32)
        if weight is not None:
            grad *= tl.load(weight + cols, mask=mask, other=0.0).to(tl.float32)
        xhat = tl.where(mask, (value - centre) * scale, 0.0)
        along += grad * xhat
        level += grad
        shift += xhat
    mean_grad = tl.sum(level, 0) / D
    mean_xhat = tl.sum(shift, 0) / D
    mean_along = tl.sum(along, 0) / D
    if mean is not None:
        mean_along -= mean_xhat * mean_grad
    tl.store(stats + row, mean_along)
    tl.store(stats + M + row, mean_grad)
    tl.store(stats + 2 * M + row, mean_xhat)


@triton.jit(do_not_specialize=["M", "tiles"])
def norm_backward_kernel(
    dy,  # (M, D) gradient of y
    x,  # (M, D) what the norm was taken of
    weight,  # (D,) or None
    mean,  # (M,) float32, or None (rms_norm)
    rstd,  # (M,) float32
    dsum,  # (M, D) added to dx, or None
    stats,  # (3, M) float32 from backward_stats_kernel, or None: the tile holds whole rows and sums them itself
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
        if mean is not None:  # the stored mean is rounded: what that left in xhat is its own mean
            if stats is not None:
                xhat -= tl.load(stats + 2 * M + rows, mask=row_mask, other=0.0)[:, None]
            else:
                xhat -= (tl.sum(tl.where(mask, xhat, 0.0), 1) / D)[:, None]
        if dbias is not None:
            dbias_acc += grad
        if dweight is not None:
            dweight_acc += grad * xhat
        if dx is not None:
            if weight is not None:
                grad *= gain
            along = tl.load(stats + rows, mask=row_mask, other=0.0) if stats is not None else tl.sum(grad * xhat, 1) / D
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
    mean, rstd = mean if mean is None else mean.contiguous(), rstd.contiguous()
    dx = torch.empty(shape, dtype=x.dtype, device=device) if want_dx else None

    wide = D > MAX_WIDTH
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
    stats = torch.empty((3, M), dtype=torch.float32, device=device) if wide and (want_dx or mean is not None) else None
    # fmt: off
    if stats is not None:
        backward_stats_kernel[(M,)](
            dy, x, weight, mean, rstd, stats, M, triton.cdiv(D, BACKWARD_STATS.width), D, stride_dy, stride_x,
            BACKWARD_STATS.width,
            num_warps=BACKWARD_STATS.num_warps, maxnreg=BACKWARD_STATS.maxnreg, enable_fp_fusion=FP_FUSION,
        )
    norm_backward_kernel[(parts, col_tiles)](
        dy, x, weight, mean, rstd, dsum, stats, dx, dweight, dbias, M, tiles, D, stride_dy, stride_x, stride_dsum,
        tile.rows, tile.width, BACKWARD_STAGES,
        num_warps=tile.num_warps, maxnreg=tile.maxnreg, enable_fp_fusion=FP_FUSION,
    )
    # fmt: on
    totals = iter(sum_partials(partials, sums, x.dtype) if sums else ())
    outs = (dx, next(totals) if want_dweight else None, next(totals) if want_dbias else None)
    return tuple(torch.empty(0, dtype=x.dtype, device=device) if out is None else out for out in outs)


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


def sweep(dtype: torch.dtype, full: bool) -> None:
    """Launches every kernel in every tile, for offline compilation: in the costliest form, or with `full` in all."""
    for D in (*BACKWARD, 2 * MAX_WIDTH):
        x, weight, stat = torch.empty(64, D, dtype=dtype), torch.empty(D, dtype=dtype), torch.empty(64)
        layer_norm_backward(x, x, weight, stat, stat, x, [True, True, True])
        if full:
            layer_norm_backward(x, x, None, stat, stat, None, [True, False, False])
            rms_norm_backward(x, x, weight, stat, x, [True, True])
            rms_norm_backward(x, x, weight, stat, None, [False, True])
