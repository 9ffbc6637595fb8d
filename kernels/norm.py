"""RMS and layer normalisation of M rows of D elements, optionally of the sum of two tensors.

One program per tile of ROWS rows held in registers; beyond MAX_WIDTH one program per row, in chunks, read twice.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .norm_backward import layer_norm_backward, rms_norm_backward
from .norm_tiles import FORWARD, FORWARD_CHUNK, width_of
from .runtime import FP_FUSION, as_rows, on_device, rounded, unsupported

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "layer_norm",
    "layer_norm_backward",
    "rms_norm",
    "rms_norm_backward",
    "unsupported",
]

MAX_WIDTH = max(FORWARD)


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
            x, residual, weight, bias, y, total, mean, rstd, M, eps, D, stride_x, stride_residual,
            tile.rows, tile.width,
            num_warps=tile.num_warps, maxnreg=tile.maxnreg, enable_fp_fusion=FP_FUSION,
        )
    else:
        tile = FORWARD_CHUNK
        wide_norm_kernel[(M,)](
            x, residual, weight, bias, y, total, mean, rstd, eps, triton.cdiv(D, tile.width),
            D, stride_x, stride_residual, tile.width,
            num_warps=tile.num_warps, maxnreg=tile.maxnreg, enable_fp_fusion=FP_FUSION,
        )
    # fmt: on
    return y, total, mean, rstd


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


def sweep(dtype: torch.dtype, full: bool) -> None:
    """Launches every kernel in every tile, for offline compilation: in the costliest form, or with `full` in all."""
    for D in (*FORWARD, 2 * MAX_WIDTH):
        x, weight = torch.empty(64, D, dtype=dtype), torch.empty(D, dtype=dtype)
        add_layer_norm(x, x, weight, weight, 1e-5)
        if full:
            layer_norm(x, None, None, 1e-5)
            add_rms_norm(x, x, weight, 1e-5)
            rms_norm(x, weight, 1e-5)
