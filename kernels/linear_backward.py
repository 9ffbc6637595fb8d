"""Gradients of the fused linear layers: dpre (M, N), the gradient before the activation, then library matrix products.

One pass computes dpre and the bias gradient: a program owns BLOCK_N columns of a fixed range of rows, writes dpre and
leaves a float32 partial of its columns' sums (reduction.py adds them).
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import ACTIVATIONS, COSTLIEST, FLAT, FROM_OUTPUT, activate, activate_grad
from .reduction import sum_partials, sum_rows
from .runtime import ALL_REGISTERS, FP_FUSION, as_rows, device_of, on_device, rounded

BLOCK_M, BLOCK_N, NUM_WARPS, STAGES = 16, 128, 4, 2
PER_SM = 4  # programs for each SM


@triton.jit
def store_partial(partials, acc, part, cols, N, ROWS: tl.constexpr, COLS: tl.constexpr):
    """This program's row of the (P, N) partials: the sum of acc over its rows."""
    tl.store(partials + part.to(tl.int64) * N + cols, sum_rows(acc, ROWS, COLS), mask=cols < N)


@triton.jit(do_not_specialize=["M", "tiles"])
def act_backward_kernel(
    dy,  # (M, N) gradient of y
    saved,  # (M, N) contiguous output or input of the activation, as it needs; None for "none"
    dpre,  # (M, N) contiguous, or None: not asked for
    dbias,  # (P, N) float32 partials, or None
    M,  # rows
    N,  # columns
    tiles,  # tiles of BLOCK_M rows that each program owns
    stride_dy,  # elements from one row of dy to the next
    p0,  # parameters of the activation
    p1,
    ACTIVATION: tl.constexpr,  # its name
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,  # tiles in flight
):
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tile in tl.range(0, tiles, num_stages=STAGES):
        rows = (part.to(tl.int64) * tiles + tile) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (rows < M)[:, None] & (cols < N)[None, :]
        grad = tl.load(dy + rows[:, None] * stride_dy + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        if saved is not None:
            value = tl.load(saved + rows[:, None] * N + cols[None, :], mask=mask, other=0.0).to(tl.float32)
            grad = activate_grad(grad, value, p0, p1, ACTIVATION)
        if dpre is not None:
            tl.store(dpre + rows[:, None] * N + cols[None, :], rounded(grad, dpre.dtype.element_ty), mask=mask)
        if dbias is not None:
            acc += grad
    if dbias is not None:
        store_partial(dbias, acc, part, cols, N, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["M", "tiles"])
def gate_backward_kernel(
    dy,  # (M, N) gradient of y = activation(gate) * up
    gate,  # (M, N) contiguous
    up,  # (M, N) contiguous
    dgate,  # (M, N) contiguous
    dup,  # (M, N) contiguous
    dbias_gate,  # (P, N) float32 partials, or None
    dbias_up,  # (P, N) float32 partials, or None
    M,  # rows
    N,  # columns
    tiles,  # tiles of BLOCK_M rows that each program owns
    stride_dy,  # elements from one row of dy to the next
    p0,  # parameters of the activation
    p1,
    ACTIVATION: tl.constexpr,  # its name
    FROM_OUTPUT: tl.constexpr,  # its derivative is a function of its output
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,  # tiles in flight
):
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    acc_gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc_up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tile in tl.range(0, tiles, num_stages=STAGES):
        rows = (part.to(tl.int64) * tiles + tile) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (rows < M)[:, None] & (cols < N)[None, :]
        offs = rows[:, None] * N + cols[None, :]
        grad = tl.load(dy + rows[:, None] * stride_dy + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        gate_value = tl.load(gate + offs, mask=mask, other=0.0).to(tl.float32)
        up_value = tl.load(up + offs, mask=mask, other=0.0).to(tl.float32)
        opened = activate(gate_value, p0, p1, ACTIVATION)
        if FROM_OUTPUT:
            gate_value = opened
        grad_gate = activate_grad(grad * up_value, gate_value, p0, p1, ACTIVATION)
        grad_up = grad * opened
        tl.store(dgate + offs, rounded(grad_gate, dgate.dtype.element_ty), mask=mask)
        tl.store(dup + offs, rounded(grad_up, dup.dtype.element_ty), mask=mask)
        if dbias_gate is not None:
            acc_gate += grad_gate
        if dbias_up is not None:
            acc_up += grad_up
    if dbias_gate is not None:
        store_partial(dbias_gate, acc_gate, part, cols, N, BLOCK_M, BLOCK_N)
    if dbias_up is not None:
        store_partial(dbias_up, acc_up, part, cols, N, BLOCK_M, BLOCK_N)


@triton.jit
def load_repeated(src, rows, col, M, N, stride, PIECES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The tile at column col of N whose columns are those of src (M, N / PIECES), each repeated PIECES times."""
    if BLOCK_N % PIECES == 0:  # whole outputs: 16 bytes at a time
        outs = col // PIECES + tl.arange(0, BLOCK_N // PIECES)
        mask = (rows < M)[:, None] & (outs < N // PIECES)[None, :]
        values = tl.load(src + rows[:, None] * stride + outs[None, :], mask=mask, other=0)
        return tl.reshape(tl.broadcast_to(values[:, :, None], (BLOCK_M, BLOCK_N // PIECES, PIECES)), (BLOCK_M, BLOCK_N))
    else:
        cols = col + tl.arange(0, BLOCK_N)
        mask = (rows < M)[:, None] & (cols < N)[None, :]
        return tl.load(src + rows[:, None] * stride + (cols // PIECES)[None, :], mask=mask, other=0)


@triton.jit(do_not_specialize=["M", "tiles"])
def maxout_backward_kernel(
    dy,  # (M, N / PIECES) gradient of y
    index,  # (M, N / PIECES) int64 contiguous, the piece that gets it
    dpre,  # (M, N) contiguous, or None: not asked for
    dbias,  # (P, N) float32 partials, or None
    M,  # rows
    N,  # columns of dpre: outputs times pieces
    tiles,  # tiles of BLOCK_M rows that each program owns
    stride_dy,  # elements from one row of dy to the next
    PIECES: tl.constexpr,  # pieces of each output
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    col = tl.program_id(0) * BLOCK_N
    cols = col + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tile in range(0, tiles):
        rows = (part.to(tl.int64) * tiles + tile) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (rows < M)[:, None] & (cols < N)[None, :]
        grad = load_repeated(dy, rows, col, M, N, stride_dy, PIECES, BLOCK_M, BLOCK_N).to(tl.float32)
        best = load_repeated(index, rows, col, M, N, N // PIECES, PIECES, BLOCK_M, BLOCK_N)
        grad = tl.where(best == (cols % PIECES)[None, :], grad, 0.0)
        if dpre is not None:
            tl.store(dpre + rows[:, None] * N + cols[None, :], rounded(grad, dpre.dtype.element_ty), mask=mask)
        if dbias is not None:
            acc += grad
    if dbias is not None:
        store_partial(dbias, acc, part, cols, N, BLOCK_M, BLOCK_N)


def _ranges(x: Tensor, M: int, N: int) -> tuple[tuple[int, int], int]:
    """(grid, tiles of each program) for programs that share the columns and the rows of an (M, N) gradient."""
    col_tiles, row_tiles = triton.cdiv(N, BLOCK_N), triton.cdiv(M, BLOCK_M)
    parts = triton.cdiv(device_of(x).num_sms * PER_SM, col_tiles)
    tiles = triton.cdiv(row_tiles, parts)
    return (col_tiles, triton.cdiv(row_tiles, tiles)), tiles


def _empty(x: Tensor) -> Tensor:
    return torch.empty(0, dtype=x.dtype, device=x.device)


def _zeros(likes: list[Tensor], output_mask: list[bool], biases: int) -> tuple[Tensor, ...]:
    """Zero gradients of those asked for: of `likes`, then of `biases` vectors as long as the last of them."""
    shapes = [t.shape for t in likes] + [likes[-1].shape[:1]] * biases
    x = likes[0]
    return tuple(x.new_zeros(shape) if want else _empty(x) for shape, want in zip(shapes, output_mask, strict=True))


def _products(dpre: Tensor, x: Tensor, weight: Tensor, shape: torch.Size, want_x: bool, want_weight: bool):
    """(dx, dweight) of those asked for, of dpre (M, N), x (M, K) and weight (N, K)."""
    dx = torch.mm(dpre, weight).view(shape) if want_x else _empty(x)
    return dx, torch.mm(dpre.t(), x) if want_weight else _empty(x)


@on_device
def linear_act_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    saved: Tensor,
    activation: str,
    params: list[float],
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias) of those asked for; saved is the output or input, as activation.FROM_OUTPUT says."""
    (N, K), M = weight.shape, math.prod(x.shape[:-1])
    want_x, want_weight, want_bias = output_mask
    if dy.numel() == 0 or activation in FLAT or not any(output_mask):
        return _zeros([x, weight], output_mask, 1)
    plain = activation == "none"
    dpre = dy.reshape(M, N) if plain else torch.empty((M, N), dtype=dy.dtype, device=dy.device)
    dbias = _empty(x)
    if want_bias or not plain:
        grid, tiles = _ranges(dy, M, N)
        rows, stride_dy = as_rows(dy, N)
        partials = torch.empty((1, grid[1], N), dtype=torch.float32, device=dy.device) if want_bias else None
        p0, p1, *_ = (*params, 0.0, 0.0)
        act_backward_kernel[grid](
            rows, None if plain else saved.contiguous(), dpre if not plain and (want_x or want_weight) else None,
            partials, M, N, tiles, stride_dy, float(p0), float(p1), activation, BLOCK_M, BLOCK_N, STAGES,
            num_warps=NUM_WARPS, enable_fp_fusion=FP_FUSION,
        )  # fmt: skip
        if partials is not None:
            (dbias,) = sum_partials(partials, 1, x.dtype)
    return *_products(dpre, x.reshape(M, K), weight, x.shape, want_x, want_weight), dbias


@on_device
def gated_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight_gate: Tensor,
    weight_up: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str,
    params: list[float],
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dweight_gate, dweight_up, dbias_gate, dbias_up) of those asked for."""
    (N, K), M = weight_gate.shape, math.prod(x.shape[:-1])
    want_x, want_gate, want_up, want_bias_gate, want_bias_up = output_mask
    if dy.numel() == 0 or not any(output_mask):
        return _zeros([x, weight_gate, weight_up], output_mask, 2)
    dgate, dup = (torch.empty((M, N), dtype=dy.dtype, device=dy.device) for _ in range(2))
    grid, tiles = _ranges(dy, M, N)
    rows, stride_dy = as_rows(dy, N)
    sums = want_bias_gate + want_bias_up
    partials = torch.empty((sums, grid[1], N), dtype=torch.float32, device=dy.device) if sums else None
    p0, p1, *_ = (*params, 0.0, 0.0)
    gate_backward_kernel[grid](
        rows, gate.contiguous(), up.contiguous(), dgate, dup, partials[0] if want_bias_gate else None,
        partials[-1] if want_bias_up else None, M, N, tiles, stride_dy, float(p0), float(p1), activation,
        activation in FROM_OUTPUT, BLOCK_M, BLOCK_N, STAGES,
        num_warps=NUM_WARPS, maxnreg=ALL_REGISTERS, enable_fp_fusion=FP_FUSION,
    )  # fmt: skip
    totals = iter(sum_partials(partials, sums, x.dtype) if sums else ())
    dbias_gate = next(totals) if want_bias_gate else _empty(x)
    dbias_up = next(totals) if want_bias_up else _empty(x)
    x2 = x.reshape(M, K)
    dx = torch.addmm(torch.mm(dgate, weight_gate), dup, weight_up).view(x.shape) if want_x else _empty(x)
    dweight_gate = torch.mm(dgate.t(), x2) if want_gate else _empty(x)
    dweight_up = torch.mm(dup.t(), x2) if want_up else _empty(x)
    return dx, dweight_gate, dweight_up, dbias_gate, dbias_up


@on_device
def maxout_linear_backward(
    dy: Tensor, x: Tensor, weight: Tensor, index: Tensor, num_pieces: int, output_mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias) of those asked for; the piece that index names gets all of dy."""
    (N, K), M = weight.shape, math.prod(x.shape[:-1])
    want_x, want_weight, want_bias = output_mask
    if dy.numel() == 0 or not any(output_mask):
        return _zeros([x, weight], output_mask, 1)
    dpre = torch.empty((M, N), dtype=dy.dtype, device=dy.device)
    grid, tiles = _ranges(dy, M, N)
    rows, stride_dy = as_rows(dy, N // num_pieces)
    partials = torch.empty((1, grid[1], N), dtype=torch.float32, device=dy.device) if want_bias else None
    maxout_backward_kernel[grid](
        rows, index.contiguous(), dpre if want_x or want_weight else None, partials, M, N, tiles, stride_dy,
        num_pieces, BLOCK_M, BLOCK_N, num_warps=NUM_WARPS, enable_fp_fusion=FP_FUSION,
    )  # fmt: skip
    dbias = sum_partials(partials, 1, x.dtype)[0] if partials is not None else _empty(x)
    return *_products(dpre, x.reshape(M, K), weight, x.shape, want_x, want_weight), dbias


def sweep(dtype: torch.dtype, full: bool) -> None:
    """Launches every kernel, for offline compilation: in the costliest form, or with `full` in all."""
    M = N = 4096
    y, x, weight, pieces = (torch.empty(rows, N, dtype=dtype) for rows in (M, M, N, 2 * N))
    for activation in ACTIVATIONS if full else (COSTLIEST,):
        linear_act_backward(y, x, weight, y, activation, [], [True, True, True])
        gated_linear_backward(y, x, weight, weight, y, y, activation, [], [True] * 5)
    maxout_linear_backward(y, x, pieces, torch.empty(M, N, dtype=torch.int64), 2, [True, True, True])
