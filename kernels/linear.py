"""Linear layers with their activation: x (M, K) times weight (N, K) transposed, bias, activation, in one kernel.

Persistent: each program walks BLOCK_M x BLOCK_N tiles of y in groups of GROUP_M rows of tiles; bias and activation act on
the float32 accumulator. Tiles come through tensor descriptors (TMA) or pointers. gated_linear keeps two accumulators,
maxout_linear multiplies with one piece after another and keeps the best.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .activation import activate
from .linear_backward import gated_linear_backward, linear_act_backward, maxout_linear_backward
from .linear_tiles import GROUP_M, TMA_ARCH, TMA_MIN_WORK, Tile, tile_for
from .runtime import FP_FUSION, INTERPRETED, as_rows, device_of, on_device, rounded, unsupported

__all__ = [
    "gated_linear",
    "gated_linear_backward",
    "linear_act",
    "linear_act_backward",
    "maxout_linear",
    "maxout_linear_backward",
    "unsupported",
]


@triton.jit
def tile_origin(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """First row and column of the tile: GROUP_M rows of tiles are walked column by column."""
    in_group = GROUP_M * tl.cdiv(N, BLOCK_N)
    first_m = tile // in_group * GROUP_M
    rows = tl.minimum(tl.cdiv(M, BLOCK_M) - first_m, GROUP_M)
    return (first_m + tile % in_group % rows) * BLOCK_M, tile % in_group // rows * BLOCK_N


@triton.jit
def load_tile(
    src, row, col, offset, num_rows, num_cols, stride, ROWS: tl.constexpr, COLS: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr
):
    """src[row:row+ROWS, col:col+COLS] of the columns from `offset` on; zeros past num_cols, some other row past num_rows."""
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
    """acc + a b^T. The interpreter multiplies bfloat16 as raw integers, so it gets float32, in which the product is exact."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), tl.trans(b.to(tl.float32)), acc)
    else:
        return tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)


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
    PRECISION: tl.constexpr,  # of float32 products: "tf32" or "ieee"
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
        for k in range(0, K, BLOCK_K):
            a = load_tile(x, row, k, 0, M, K, stride_x, BLOCK_M, BLOCK_K, EVEN_K, TMA)
            b = load_tile(weight, col, k, 0, N, K, stride_weight, BLOCK_N, BLOCK_K, EVEN_K, TMA)
            acc = multiply_add(a, b, acc, PRECISION)
        acc = add_bias(acc, bias, col, 1, 0, N, BLOCK_N)
        if pre is not None:
            store_tile(pre, acc, row, col, M, N, BLOCK_M, BLOCK_N, TMA)
        store_tile(y, activate(acc, p0, p1, ACTIVATION), row, col, M, N, BLOCK_M, BLOCK_N, TMA)


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
    PRECISION: tl.constexpr,  # of float32 products: "tf32" or "ieee"
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
        for k in range(0, K, BLOCK_K):
            a = load_tile(x, row, k, 0, M, K, stride_x, BLOCK_M, BLOCK_K, EVEN_K, TMA)
            b = load_tile(weight_gate, col, k, 0, N, K, stride_gate, BLOCK_N, BLOCK_K, EVEN_K, TMA)
            acc_gate = multiply_add(a, b, acc_gate, PRECISION)
            b = load_tile(weight_up, col, k, 0, N, K, stride_up, BLOCK_N, BLOCK_K, EVEN_K, TMA)
            acc_up = multiply_add(a, b, acc_up, PRECISION)
        acc_gate = add_bias(acc_gate, bias_gate, col, 1, 0, N, BLOCK_N)
        acc_up = add_bias(acc_up, bias_up, col, 1, 0, N, BLOCK_N)
        if gate is not None:
            store_tile(gate, acc_gate, row, col, M, N, BLOCK_M, BLOCK_N, TMA)
            store_tile(up, acc_up, row, col, M, N, BLOCK_M, BLOCK_N, TMA)
        store_tile(y, activate(acc_gate, p0, p1, ACTIVATION) * acc_up, row, col, M, N, BLOCK_M, BLOCK_N, TMA)


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
    PRECISION: tl.constexpr,  # of float32 products: "tf32" or "ieee"
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
            for k in range(0, K, BLOCK_K):
                a = load_tile(x, row, k, 0, M, K, stride_x, BLOCK_M, BLOCK_K, EVEN_K, TMA)
                b = load_tile(weight, col, k, piece * K, N, K, stride_weight, BLOCK_N, BLOCK_K, EVEN_K, TMA)
                acc = multiply_add(a, b, acc, PRECISION)
            acc = add_bias(acc, bias, col, PIECES, piece, N, BLOCK_N)
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


def can_describe(*tensors: Tensor | None) -> bool:
    """Whether TMA descriptors can address these 2-d tensors: base and rows on 16-byte boundaries."""
    return all(t is None or (t.data_ptr() % 16 == 0 and t.stride(0) * t.itemsize % 16 == 0) for t in tensors)


def describe(t: Tensor | None, rows: int, cols: int) -> TensorDescriptor | None:
    """A descriptor of the 2-d tensor t that moves blocks of rows x cols."""
    return None if t is None else TensorDescriptor(t, list(t.shape), [t.stride(0), 1], [rows, cols])


class _Plan:
    """How one call is launched: its rows, tile, grid, and whether by TMA."""

    def __init__(self, kind: str, x: Tensor, N: int, tile: Tile | None, tma: bool | None) -> None:
        self.K = x.shape[-1]
        self.M = math.prod(x.shape[:-1])
        self.arithmetic = arithmetic_of(x.dtype)
        device = device_of(x)
        self.tile = tile = tile or tile_for(kind, self.arithmetic, self.M, N, device.arch, device.num_sms)
        tiles = triton.cdiv(self.M, tile.block_m) * triton.cdiv(N, tile.block_n)
        self.grid = (min(tiles, device.num_sms * tile.per_sm),)
        self.even = self.K % tile.block_k == 0
        if tma is None:
            large = self.M * N * self.K >= TMA_MIN_WORK and tile.block_m >= 64 and self.arithmetic != "ieee"
            tma = large and device.arch >= TMA_ARCH
        self.tma = tma and self.K > 0
        self.constants = ("tf32" if self.arithmetic == "tf32" else "ieee", *tile[:3], GROUP_M, self.even)
        self.options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": FP_FUSION}


def _inner_contiguous(weight: Tensor) -> Tensor:
    return weight if weight.stride(1) == 1 or weight.shape[1] == 1 else weight.contiguous()


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
    plan = _Plan("linear", x, N, tile, tma)
    y = torch.empty((*x.shape[:-1], N), dtype=x.dtype, device=x.device)
    pre = torch.empty(y.shape if save else 0, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y, pre
    x, stride_x = as_rows(x, plan.K)
    weight = _inner_contiguous(weight)
    bias = bias if bias is None else bias.contiguous()
    args = (x, weight, bias, y, pre if save else None)
    if plan.tma:
        M, K, t = plan.M, plan.K, plan.tile
        x2, y2, pre2 = x.view(M, K) if x.dim() != 2 else x, y.view(M, N), pre.view(M, N) if save else None
        plan.tma = can_describe(x2, weight, y2)
        if plan.tma:
            a, b = describe(x2, t.block_m, t.block_k), describe(weight, t.block_n, t.block_k)
            args = (a, b, bias, describe(y2, t.block_m, t.block_n), describe(pre2, t.block_m, t.block_n))
    linear_act_kernel[plan.grid](
        *args, plan.M, N, plan.K, stride_x, weight.stride(0), *_params(params), activation, *plan.constants, plan.tma, **plan.options
    )
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
    plan = _Plan("gated", x, N, tile, tma)
    y = torch.empty((*x.shape[:-1], N), dtype=x.dtype, device=x.device)
    gate, up = (torch.empty(y.shape if save else 0, dtype=x.dtype, device=x.device) for _ in range(2))
    if y.numel() == 0:
        return y, gate, up
    x, stride_x = as_rows(x, plan.K)
    weight_gate, weight_up = _inner_contiguous(weight_gate), _inner_contiguous(weight_up)
    bias_gate = bias_gate if bias_gate is None else bias_gate.contiguous()
    bias_up = bias_up if bias_up is None else bias_up.contiguous()
    inputs, outputs = (x, weight_gate, weight_up), (y, gate, up) if save else (y, None, None)
    if plan.tma:
        M, K, t = plan.M, plan.K, plan.tile
        x2 = x.view(M, K) if x.dim() != 2 else x
        flat = tuple(None if out is None else out.view(M, N) for out in outputs)
        plan.tma = can_describe(x2, weight_gate, weight_up, *flat)
        if plan.tma:
            inputs = (describe(x2, t.block_m, t.block_k), *(describe(w, t.block_n, t.block_k) for w in inputs[1:]))
            outputs = tuple(describe(out, t.block_m, t.block_n) for out in flat)
    strides = (stride_x, weight_gate.stride(0), weight_up.stride(0))
    gated_linear_kernel[plan.grid](
        *inputs, bias_gate, bias_up, *outputs, plan.M, N, plan.K, *strides, *_params(params), activation, *plan.constants,
        plan.tma, **plan.options,
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
    plan = _Plan("maxout", x, N, tile, tma)
    y = torch.empty((*x.shape[:-1], N), dtype=x.dtype, device=x.device)
    index = torch.empty(y.shape, dtype=torch.int64, device=x.device)
    if y.numel() == 0:
        return y, index
    x, stride_x = as_rows(x, plan.K)
    weight = weight.contiguous()
    bias = bias if bias is None else bias.contiguous()
    inputs = (x, weight)
    if plan.tma:
        t = plan.tile
        x2 = x.view(plan.M, plan.K) if x.dim() != 2 else x
        wide = weight.view(N, num_pieces * plan.K)
        plan.tma = plan.even and can_describe(x2, wide)
        if plan.tma:
            inputs = (describe(x2, t.block_m, t.block_k), describe(wide, t.block_n, t.block_k))
    maxout_linear_kernel[plan.grid](
        *inputs, bias, y, index, plan.M, N, plan.K, stride_x, num_pieces, *plan.constants, plan.tma, **plan.options
    )
    return y, index
