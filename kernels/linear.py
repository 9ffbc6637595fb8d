"""Linear layers with their activation: x (M, K) times weight (N, K) transposed, bias, activation, in one kernel.

Persistent: each program walks BLOCK_M x BLOCK_N tiles of y in groups of GROUP_M rows of tiles; bias and activation act
on the float32 accumulator. Tiles come through tensor descriptors (TMA) or pointers. gated_linear keeps two
accumulators, maxout_linear multiplies with one piece after another and keeps the best.
"""

import math
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .activation import ACTIVATIONS, COSTLIEST
from .linear_backward import gated_linear_backward, linear_act_backward, maxout_linear_backward
from .linear_tiles import (
    EPILOGUE_BYTES,
    GROUP_M,
    MAX_BLOCK_K,
    TMA_MIN_ROWS,
    TMA_MIN_WORK,
    Tile,
    may_use_tma,
    tile_for,
    tiles_of,
)
from .matmul import add_bias, end_run, finish, finish_gated, load_tile, multiply_add, store_tile, tile_origin
from .runtime import ALL_REGISTERS, FP_FUSION, as_rows, device_of, on_device, unsupported

__all__ = [
    "gated_linear",
    "gated_linear_backward",
    "linear_act",
    "linear_act_backward",
    "maxout_linear",
    "maxout_linear_backward",
    "unsupported",
]


@triton.jit(do_not_specialize=["M"])
def linear_act_kernel(
    x,  # (M, K), pointer or descriptor
    weight,  # (N, K), pointer or descriptor
    bias,  # (N,) or None
    y,  # (M, N) contiguous, pointer or descriptor
    pre,  # (M, N) what the activation was taken of, or None: not asked for
    M,  # rows
    N,  # outputs
    K,  # inputs
    stride_x,  # elements from one row of x to the next
    stride_weight,  # the same for weight
    p0,  # parameters of the activation
    p1,
    ACTIVATION: tl.constexpr,  # its name
    PRECISION: tl.constexpr,  # of the products: "ieee" for full float32, else "tf32"
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,  # rows of tiles walked together
    EVEN_K: tl.constexpr,  # K is a multiple of BLOCK_K
    TMA: tl.constexpr,  # x, weight, y and pre are descriptors
):
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N), tl.num_programs(0), flatten=TMA):
        row, col = tile_origin(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        total = tl.zeros_like(acc) if PRECISION == "ieee" else 0.0
        for k in range(0, K, BLOCK_K):
            a = load_tile(x, row, k, 0, M, K, stride_x, BLOCK_M, BLOCK_K, EVEN_K, TMA)
            b = load_tile(weight, col, k, 0, N, K, stride_weight, BLOCK_N, BLOCK_K, EVEN_K, TMA)
            acc = multiply_add(a, b, acc, PRECISION)
            if PRECISION == "ieee":
                total, acc = end_run(total, acc, k, BLOCK_K)
        finish(acc + total, bias, y, pre, row, col, M, N, p0, p1, ACTIVATION, BLOCK_M, BLOCK_N, TMA)


@triton.jit(do_not_specialize=["M"])
def gated_linear_kernel(
    x,  # (M, K), pointer or descriptor
    weight_gate,  # (N, K), pointer or descriptor
    weight_up,  # (N, K), pointer or descriptor
    bias_gate,  # (N,) or None
    bias_up,  # (N,) or None
    y,  # (M, N) contiguous, pointer or descriptor: activation(gate) * up
    gate,  # (M, N) or None: not asked for
    up,  # (M, N) or None: not asked for
    M,  # rows
    N,  # outputs
    K,  # inputs
    stride_x,  # elements from one row of x to the next
    stride_gate,  # the same for weight_gate
    stride_up,  # the same for weight_up
    p0,  # parameters of the activation
    p1,
    ACTIVATION: tl.constexpr,  # its name
    PRECISION: tl.constexpr,  # of the products: "ieee" for full float32, else "tf32"
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,  # rows of tiles walked together
    EVEN_K: tl.constexpr,  # K is a multiple of BLOCK_K
    TMA: tl.constexpr,  # x, the weights and the outputs are descriptors
):
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N), tl.num_programs(0), flatten=TMA):
        row, col = tile_origin(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        acc_gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc_up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        total_gate = tl.zeros_like(acc_gate) if PRECISION == "ieee" else 0.0
        total_up = total_gate
        for k in range(0, K, BLOCK_K):
            a = load_tile(x, row, k, 0, M, K, stride_x, BLOCK_M, BLOCK_K, EVEN_K, TMA)
            b = load_tile(weight_gate, col, k, 0, N, K, stride_gate, BLOCK_N, BLOCK_K, EVEN_K, TMA)
            acc_gate = multiply_add(a, b, acc_gate, PRECISION)
            b = load_tile(weight_up, col, k, 0, N, K, stride_up, BLOCK_N, BLOCK_K, EVEN_K, TMA)
            acc_up = multiply_add(a, b, acc_up, PRECISION)
            if PRECISION == "ieee":
                total_gate, acc_gate = end_run(total_gate, acc_gate, k, BLOCK_K)
                total_up, acc_up = end_run(total_up, acc_up, k, BLOCK_K)
        acc_gate += total_gate
        acc_up += total_up
        finish_gated(
            acc_gate, acc_up, bias_gate, bias_up, y, gate, up, row, col, M, N, p0, p1, ACTIVATION, BLOCK_M, BLOCK_N, TMA
        )


@triton.jit(do_not_specialize=["M"])
def maxout_linear_kernel(
    x,  # (M, K), pointer or descriptor
    weight,  # (N, PIECES K) contiguous, pointer or descriptor: the pieces of an output side by side
    bias,  # (N PIECES,) or None
    y,  # (M, N) contiguous
    index,  # (M, N) int64, the first piece with the greatest value; NaN is greater than any
    M,  # rows
    N,  # outputs
    K,  # inputs
    stride_x,  # elements from one row of x to the next
    PIECES: tl.constexpr,  # pieces of each output
    PRECISION: tl.constexpr,  # of the products: "ieee" for full float32, else "tf32"
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,  # rows of tiles walked together
    EVEN_K: tl.constexpr,  # K is a multiple of BLOCK_K
    TMA: tl.constexpr,  # x and weight are descriptors (which needs EVEN_K: a tile must not reach into the next piece)
):
    stride_weight = K * PIECES
    for tile in range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N), tl.num_programs(0)):
        row, col = tile_origin(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        best = tl.full((BLOCK_M, BLOCK_N), float("-inf"), tl.float32)
        piece_of_best = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
        for piece in range(PIECES):
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            total = tl.zeros_like(acc) if PRECISION == "ieee" else 0.0
            for k in range(0, K, BLOCK_K):
                a = load_tile(x, row, k, 0, M, K, stride_x, BLOCK_M, BLOCK_K, EVEN_K, TMA)
                b = load_tile(weight, col, k, piece * K, N, K, stride_weight, BLOCK_N, BLOCK_K, EVEN_K, TMA)
                acc = multiply_add(a, b, acc, PRECISION)
                if PRECISION == "ieee":
                    total, acc = end_run(total, acc, k, BLOCK_K)
            acc = add_bias(acc + total, bias, col, PIECES, piece, N, BLOCK_N)
            better = (acc > best) | ((acc != acc) & (best == best))
            best = tl.where(better, acc, best)
            piece_of_best = tl.where(better, piece, piece_of_best)
        store_tile(y, best, row, col, M, N, BLOCK_M, BLOCK_N, False)
        rows = row.to(tl.int64) + tl.arange(0, BLOCK_M)
        cols = col + tl.arange(0, BLOCK_N)
        mask = (rows < M)[:, None] & (cols < N)[None, :]
        tl.store(index + rows[:, None] * N + cols[None, :], piece_of_best.to(tl.int64), mask=mask)


def arithmetic_of(dtype: torch.dtype) -> str:
    """Which of the tables of linear_tiles serves this dtype: float32 follows torch's matmul precision."""
    if dtype != torch.float32:
        return "half"
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def can_describe(*tensors: Tensor) -> bool:
    """Whether TMA descriptors can address these 2-d tensors: base and rows on 16-byte boundaries."""
    return all(t.data_ptr() % 16 == 0 and t.stride(0) * t.itemsize % 16 == 0 for t in tensors)


def describe(t: Tensor, rows: int, cols: int) -> TensorDescriptor:
    """A descriptor of the 2-d tensor t that moves blocks of rows x cols."""
    return TensorDescriptor(t, list(t.shape), [t.stride(0), 1], [rows, cols])


class _Plan:
    """How one call is launched: its operands as rows, tile, grid, and whether by TMA."""

    def __init__(
        self, kind: str, x: Tensor, weights: list[Tensor], N: int, tile: Tile | None, tma: bool | None
    ) -> None:
        K, M = x.shape[-1], math.prod(x.shape[:-1])
        device, arithmetic = device_of(x), arithmetic_of(x.dtype)
        x, stride_x = as_rows(x, K)
        weights = [w if w.stride(1) == 1 or K <= 1 else w.contiguous() for w in weights]
        if tma is None:
            tma = may_use_tma(arithmetic, device.arch) and M * N * K >= TMA_MIN_WORK and M >= TMA_MIN_ROWS
        if tma:
            x = x if x.dim() == 2 else x.view(M, K)
            apart = kind != "maxout" or K % (tile.block_k if tile else MAX_BLOCK_K) == 0  # else a tile spans two pieces
            tma = K > 0 and apart and N * x.itemsize % 16 == 0 and can_describe(x, *weights)
        self.tile = tile = tile or tile_for(kind, arithmetic, M, N, device.arch, device.num_sms, tma)
        tiles = triton.cdiv(M, tile.block_m) * triton.cdiv(N, tile.block_n)
        self.grid = (min(tiles, device.num_sms * tile.per_sm),)
        self.x, self.weights, self.tma = x, weights, tma
        self.sizes = (M, N, K, stride_x)
        self.strides = [w.stride(0) for w in weights]
        precision = "ieee" if arithmetic == "ieee" else "tf32"  # halves have the one
        self.constants = (precision, tile.block_m, tile.block_n, tile.block_k, GROUP_M, K % tile.block_k == 0, tma)
        self.options = {
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
            "maxnreg": ALL_REGISTERS,
            "enable_fp_fusion": FP_FUSION,
        }

    def inputs(self) -> list[Tensor | TensorDescriptor]:
        """x and the weights as the kernel takes them."""
        if not self.tma:
            return [self.x, *self.weights]
        t = self.tile
        return [describe(self.x, t.block_m, t.block_k), *(describe(w, t.block_n, t.block_k) for w in self.weights)]

    def outputs(self, outs: list[Tensor | None]) -> list[Tensor | TensorDescriptor | None]:
        """Outputs (..., N) as the kernel takes them."""
        if not self.tma:
            return outs
        M, N = self.sizes[:2]
        cols = min(self.tile.block_n, EPILOGUE_BYTES.value // self.x.itemsize)
        return [None if out is None else describe(out.view(M, N), self.tile.block_m, cols) for out in outs]


def _params(params: list[float]) -> tuple[float, float]:
    p0, p1, *_ = (*params, 0.0, 0.0)
    return float(p0), float(p1)


@on_device
def linear_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    params: list[float],
    save: bool,
    *,
    tile: Tile | None = None,
    tma: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """(y, pre): activation of x weight^T + bias, and what it was taken of where `save` asks for it.

    tile and tma override the tables' choice (for tests and measurements).
    """
    N = weight.shape[0]
    y = torch.empty((*x.shape[:-1], N), dtype=x.dtype, device=x.device)
    pre = torch.empty(y.shape if save else 0, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y, pre
    plan = _Plan("linear", x, [weight], N, tile, tma)
    bias = bias if bias is None else bias.contiguous()
    linear_act_kernel[plan.grid](
        *plan.inputs(), bias, *plan.outputs([y, pre if save else None]), *plan.sizes, *plan.strides, *_params(params),
        activation, *plan.constants, **plan.options,
    )  # fmt: skip
    return y, pre


@on_device
def gated_linear(
    x: Tensor,
    weight_gate: Tensor,
    weight_up: Tensor,
    bias_gate: Tensor | None,
    bias_up: Tensor | None,
    activation: str,
    params: list[float],
    save: bool,
    *,
    tile: Tile | None = None,
    tma: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, gate, up): activation(gate) * up of the two products, and the products themselves where `save` asks for them.

    tile and tma override the tables' choice (for tests and measurements).
    """
    N = weight_gate.shape[0]
    y = torch.empty((*x.shape[:-1], N), dtype=x.dtype, device=x.device)
    gate, up = (torch.empty(y.shape if save else 0, dtype=x.dtype, device=x.device) for _ in range(2))
    if y.numel() == 0:
        return y, gate, up
    plan = _Plan("gated", x, [weight_gate, weight_up], N, tile, tma)
    bias_gate = bias_gate if bias_gate is None else bias_gate.contiguous()
    bias_up = bias_up if bias_up is None else bias_up.contiguous()
    outputs = [y, gate, up] if save else [y, None, None]
    gated_linear_kernel[plan.grid](
        *plan.inputs(), bias_gate, bias_up, *plan.outputs(outputs), *plan.sizes, *plan.strides, *_params(params),
        activation, *plan.constants, **plan.options,
    )  # fmt: skip
    return y, gate, up


@on_device
def maxout_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    num_pieces: int,
    *,
    tile: Tile | None = None,
    tma: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """(y, index): the greatest of each output's num_pieces products, and which it was, as torch.max counts.

    tile and tma override the tables' choice (for tests and measurements).
    """
    N = weight.shape[0] // num_pieces
    y = torch.empty((*x.shape[:-1], N), dtype=x.dtype, device=x.device)
    index = torch.empty(y.shape, dtype=torch.int64, device=x.device)
    if y.numel() == 0:
        return y, index
    plan = _Plan("maxout", x, [weight.contiguous().view(N, num_pieces * weight.shape[1])], N, tile, tma)
    bias = bias if bias is None else bias.contiguous()
    maxout_linear_kernel[plan.grid](
        *plan.inputs(), bias, y, index, *plan.sizes, num_pieces, *plan.constants, **plan.options
    )
    return y, index


def sweep(dtype: torch.dtype, full: bool) -> None:
    """Launches every kernel in every tile, for offline compilation: in the costliest form, or with `full` in all."""
    M = N = 4096
    bias, activations = torch.empty(N, dtype=dtype), ACTIVATIONS if full else (COSTLIEST,)
    before = torch.get_float32_matmul_precision()
    for precision in ("highest", "high") if dtype == torch.float32 else (before,):
        torch.set_float32_matmul_precision(precision)
        arithmetic, arch = arithmetic_of(dtype), device_of(bias).arch
        for tma, K in product((True, False) if may_use_tma(arithmetic, arch) else (False,), (N, N + 16)):
            if not full and tma != (K == N):  # a tail costs pointers their masks, descriptors nothing
                continue
            x, weight, pieces = (torch.empty(rows, K, dtype=dtype) for rows in (M, N, 2 * N))
            for tile, activation in product(tiles_of("linear", arithmetic, arch, tma), activations):
                linear_act(x, weight, bias, activation, [], True, tile=tile, tma=tma)
            for tile, activation in product(tiles_of("gated", arithmetic, arch, tma), activations):
                gated_linear(x, weight, weight, bias, bias, activation, [], True, tile=tile, tma=tma)
            for tile in tiles_of("maxout", arithmetic, arch, tma):
                maxout_linear(x, pieces, torch.empty(2 * N, dtype=dtype), 2, tile=tile, tma=tma)
    torch.set_float32_matmul_precision(before)
