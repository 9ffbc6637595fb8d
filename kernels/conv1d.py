"""Causal depthwise convolution of B sequences of D channels and L steps, W taps, and its gradients.

A program has a tile of channels and rows: the steps of one batch element, which packed sequences share, or the `reach`
steps of one sequence's states. Every tap is a load of its own, which the L1 cache serves after the first. Backward:
dpre, the gradient before the activation, with partial sums of dweight and dbias; then dx and dinitial from it.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import activate, activate_grad
from .reduction import sum_partials
from .runtime import ALL_REGISTERS, FP_FUSION, empty_in_layout_of, on_device, rounded, unsupported

__all__ = ["causal_conv1d", "causal_conv1d_backward", "unsupported"]


class Tile(NamedTuple):
    channels: int
    rows: int
    num_warps: int


# By whether channels (True) or steps are adjacent in memory.
TILES = {False: Tile(8, 256, 8), True: Tile(32, 64, 8)}


@triton.jit
def place(rows, sequences, bounds, L, reach, STATES: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr):
    """This program's batch element or sequence, channels and rows; and of each row its step and its sequence, where
    that begins and where it ends."""
    blocks = (rows + BLOCK_L - 1) // BLOCK_L
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    row = (tl.program_id(0) % blocks * BLOCK_L + tl.arange(0, BLOCK_L)).to(tl.int64)
    begin = 0 * row
    end = begin + L
    sequence = begin + batch
    if STATES == "none" and sequences is not None:
        sequence = tl.load(sequences + row, mask=row < rows, other=0).to(tl.int64)
    if bounds is not None:
        begin, end = tl.load(bounds + sequence).to(tl.int64), tl.load(bounds + sequence + 1).to(tl.int64)
        end = tl.maximum(begin, end)
    t = row
    if STATES == "initial":
        t += begin - reach
    elif STATES == "final":
        t += end - reach
    elif bounds is not None:  # those that contradict each other are followed to no other memory
        begin, end = tl.minimum(begin, t), tl.maximum(end, t + 1)
    return batch, d, row, t, sequence, begin, end


@triton.jit
def seen(x, initial, seq_idx, index, age, present, channels, back, stride_t):
    """(BLOCK_D, BLOCK_L) float32: what stands `back` steps before those that x, initial and seq_idx point to, which
    are `age` steps into their sequences; zero where its index is another or the step is not present."""
    if seq_idx is not None:  # before the first step, the first step's
        present &= tl.load(seq_idx - tl.minimum(back, age), mask=present, other=-1) == index
    mask = channels & (present & (age >= back))[None, :]
    value = tl.load(x - back * stride_t, mask=mask, other=0.0).to(tl.float32)
    if initial is not None:
        mask = channels & (present & (age < back))[None, :]
        value += tl.load(initial - back, mask=mask, other=0.0).to(tl.float32)
    return value


@triton.jit
def convolve(
    x, weight, bias, initial, seq_idx, index, age, present, d, channels, dilation, stride_t,
    W: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """(BLOCK_D, BLOCK_L) float32: the convolution before its activation."""
    acc = tl.full((BLOCK_D, BLOCK_L), 0.0, tl.float32)
    if bias is not None:
        acc += tl.load(bias + d[:, None], mask=channels, other=0.0).to(tl.float32)
    weight += d[:, None] * W
    for k in range(W):
        value = seen(x, initial, seq_idx, index, age, present, channels, (W - 1 - k) * dilation, stride_t)
        acc += value * tl.load(weight + k, mask=channels, other=0.0).to(tl.float32)
    return acc


@triton.jit
def sum_steps(x, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr):
    """(BLOCK_D,) float32: x summed over its steps, a few in float32 and these in double, as terms of both signs ask."""
    x = tl.sum(tl.reshape(x, (BLOCK_D, BLOCK_L // 4, 4)), 2)
    return tl.sum(x.to(tl.float64), 1).to(tl.float32)


@triton.jit
def conv_kernel(
    x,  # (B, D, L)
    weight,  # (D, W)
    bias,  # (D,) or None
    initial,  # (sequences, D, reach) or None
    seq_idx,  # (B, L) or None
    sequences,  # (L,) the sequence of each step, or None: B sequences of L
    bounds,  # (sequences + 1,) or None
    out,  # y (B, D, L), or the final states (sequences, D, reach)
    rows,  # of out
    D,  # channels
    L,  # steps
    reach,  # steps before its own that a step sees
    dilation,  # steps from tap to tap
    stride_xb,  # 0 where sequences share a batch element
    stride_xd,
    stride_xt,
    stride_ob,
    stride_od,
    stride_ot,
    W: tl.constexpr,  # taps
    ACTIVATION: tl.constexpr,
    STATES: tl.constexpr,  # "none": out is y; "final": the states
    BLOCK_D: tl.constexpr,  # channels of a program
    BLOCK_L: tl.constexpr,  # rows of a program
):
    batch, d, row, t, sequence, begin, _ = place(rows, sequences, bounds, L, reach, STATES, BLOCK_D, BLOCK_L)
    channels = (d < D)[:, None]
    present = row < rows
    mask = channels & present[None, :]
    x += batch * stride_xb + d[:, None] * stride_xd + t[None, :] * stride_xt
    if initial is not None:
        initial += (sequence[None, :] * D + d[:, None]) * reach + (t - begin + reach)[None, :]
    index = t
    if seq_idx is not None:
        seq_idx += batch * L
        index = tl.load(seq_idx + (t if STATES == "none" else 0 * t + L - 1), mask=present, other=-1)
        seq_idx += t
        present &= index >= 0
    if STATES == "none":
        acc = convolve(
            x, weight, bias, initial, seq_idx, index, t - begin, present, d, channels, dilation, stride_xt,
            W, BLOCK_D, BLOCK_L,
        )  # fmt: skip
        acc = tl.where(present[None, :], activate(acc, 0.0, 0.0, ACTIVATION), 0.0)
    else:
        acc = seen(x, initial, seq_idx, index, t - begin, present, channels, 0, stride_xt)
    out += batch * stride_ob + d[:, None] * stride_od + row[None, :] * stride_ot
    tl.store(out, rounded(acc, out.dtype.element_ty), mask=mask)


@triton.jit
def dpre_kernel(
    dy,  # (B, D, L)
    x,  # (B, D, L)
    weight,  # (D, W)
    bias,  # (D,) or None
    initial,  # (sequences, D, reach) or None
    seq_idx,  # (B, L) or None
    sequences,  # (L,) or None
    bounds,  # (sequences + 1,) or None
    dpre,  # (B, D, L) float32, in x's layout
    dweight,  # (P, D, W) float32 partial sums, a row per batch element and block of steps, or None
    dbias,  # (P, D) float32, or None
    D,
    L,
    reach,
    dilation,
    stride_gb,  # of dy
    stride_gd,
    stride_gt,
    stride_xb,
    stride_xd,
    stride_xt,
    stride_ob,  # of dpre
    stride_od,
    stride_ot,
    W: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    batch, d, _, t, sequence, begin, _ = place(L, sequences, bounds, L, reach, "none", BLOCK_D, BLOCK_L)
    channels = (d < D)[:, None]
    present = t < L
    inside = channels & present[None, :]
    x += batch * stride_xb + d[:, None] * stride_xd + t[None, :] * stride_xt
    if initial is not None:
        initial += (sequence[None, :] * D + d[:, None]) * reach + (t - begin + reach)[None, :]
    index = t
    if seq_idx is not None:
        seq_idx += batch * L + t
        index = tl.load(seq_idx, mask=present, other=-1)
        present &= index >= 0
    mask = channels & present[None, :]
    dy += batch * stride_gb + d[:, None] * stride_gd + t[None, :] * stride_gt
    grad = tl.load(dy, mask=mask, other=0.0).to(tl.float32)
    if ACTIVATION != "none":
        pre = convolve(
            x, weight, bias, initial, seq_idx, index, t - begin, present, d, channels, dilation, stride_xt,
            W, BLOCK_D, BLOCK_L,
        )  # fmt: skip
        grad = tl.where(mask, activate_grad(grad, pre, 0.0, 0.0, ACTIVATION), 0.0)
    tl.store(dpre + batch * stride_ob + d[:, None] * stride_od + t[None, :] * stride_ot, grad, mask=inside)
    partial = tl.program_id(0).to(tl.int64) * D + d
    if dbias is not None:
        tl.store(dbias + partial, sum_steps(grad, BLOCK_D, BLOCK_L), mask=d < D)
    if dweight is not None:
        for k in range(W):
            back = (W - 1 - k) * dilation
            value = seen(x, initial, seq_idx, index, t - begin, present, channels, back, stride_xt)
            tl.store(dweight + partial * W + k, sum_steps(grad * value, BLOCK_D, BLOCK_L), mask=d < D)


@triton.jit
def dx_kernel(
    dpre,  # (B, D, L) float32
    weight,  # (D, W)
    seq_idx,  # (B, L) or None
    sequences,  # (L,) or None
    bounds,  # (sequences + 1,) or None
    dfinal,  # (sequences, D, reach) or None
    out,  # dx (B, D, L), or dinitial (sequences, D, reach)
    rows,  # of out
    D,
    L,
    reach,
    dilation,
    stride_gb,  # of dpre, 0 where sequences share a batch element
    stride_gd,
    stride_gt,
    stride_ob,
    stride_od,
    stride_ot,
    W: tl.constexpr,
    STATES: tl.constexpr,  # "none": out is dx; "initial": dinitial
    BLOCK_D: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    batch, d, row, t, sequence, begin, end = place(rows, sequences, bounds, L, reach, STATES, BLOCK_D, BLOCK_L)
    channels = (d < D)[:, None]
    present = row < rows
    dpre += batch * stride_gb + d[:, None] * stride_gd + t[None, :] * stride_gt
    weight += d[:, None] * W
    index = t
    if seq_idx is not None:
        seq_idx += batch * L
        index = tl.load(seq_idx + tl.maximum(t, 0), mask=present, other=-1)
    acc = tl.full((BLOCK_D, BLOCK_L), 0.0, tl.float32)
    for k in range(W):
        after = (W - 1 - k) * dilation
        receives = present & (t + after >= begin) & (t + after < end)
        if seq_idx is not None:
            receives &= tl.load(seq_idx + t + after, mask=receives, other=-1) == index
        value = tl.load(dpre + after * stride_gt, mask=channels & receives[None, :], other=0.0)
        acc += value * tl.load(weight + k, mask=channels, other=0.0).to(tl.float32)
    if dfinal is not None:
        held = present & (t >= end - reach)
        if seq_idx is not None:
            held &= (index == tl.load(seq_idx + L - 1)) & (index >= 0)
        dfinal += (sequence[None, :] * D + d[:, None]) * reach + (t - end + reach)[None, :]
        acc += tl.load(dfinal, mask=channels & held[None, :], other=0.0).to(tl.float32)
    out += batch * stride_ob + d[:, None] * stride_od + row[None, :] * stride_ot
    tl.store(out, rounded(acc, out.dtype.element_ty), mask=channels & present[None, :])


class _Call:
    """What the launches of one call share: the sequences, the layout, the tile."""

    def __init__(
        self, x: Tensor, weight: Tensor, seq_idx: Tensor | None, cu_seqlens: Tensor | None, dilation: int
    ) -> None:
        (B, D, L), W = x.shape, weight.shape[1]
        self.x, self.sizes, self.states = x, (D, L, (W - 1) * dilation, dilation), (B, D, (W - 1) * dilation)
        self.channels_last = x.stride(1) == 1 and x.stride(2) != 1
        sequences = bounds = None
        if cu_seqlens is not None:
            count = cu_seqlens.shape[0] - 1
            self.states = count, *self.states[1:]
            bounds = cu_seqlens.clamp(0, L)  # beyond the tensor they are not followed
            steps = torch.arange(L, device=x.device, dtype=torch.int32)
            ends = bounds[1:].contiguous()
            sequences = torch.searchsorted(ends, steps, right=True, out_int32=True).clamp(max=count - 1)
        self.boundaries = seq_idx.contiguous() if seq_idx is not None and L else None, sequences, bounds

    def like_states(self) -> Tensor:
        return self.x.new_empty(self.states)

    def by_sequence(self, x: Tensor) -> Tensor:
        """x, whose one batch element packed sequences share."""
        return x.expand(self.states[0], -1, -1) if self.boundaries[2] is not None else x

    def blocks(self, out: Tensor) -> int:
        return out.shape[0] * triton.cdiv(out.shape[2], TILES[self.channels_last].rows)

    def launch(self, kernel: Any, out: Tensor, *args: Any) -> None:
        """Launches the kernel for all of out."""
        channels, rows, num_warps = TILES[self.channels_last]
        grid = self.blocks(out), triton.cdiv(out.shape[1], channels)
        if out.numel():
            kernel[grid](*args, channels, rows, num_warps=num_warps, maxnreg=ALL_REGISTERS, enable_fp_fusion=FP_FUSION)


def _dense(*tensors: Tensor | None) -> list[Any]:
    return [x if x is None else x.contiguous() for x in tensors]


@on_device
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str,
    dilation: int,
    return_final_states: bool,
) -> tuple[Tensor, Tensor]:
    """(y, final_states) of x (B, D, L), weight (D, W)."""
    call = _Call(x, weight, seq_idx, cu_seqlens, dilation)
    args = call.by_sequence(x), *_dense(weight, bias, initial_states), *call.boundaries

    def fill(out: Tensor, states: str) -> Tensor:
        strides = *args[0].stride(), *out.stride()
        call.launch(
            conv_kernel, out, *args, out, out.shape[2], *call.sizes, *strides, weight.shape[1], activation, states
        )
        return out

    y = fill(empty_in_layout_of(x), "none")
    return y, fill(call.like_states(), "final") if return_final_states else x.new_empty(0)


@on_device
def causal_conv1d_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    dfinal_states: Tensor | None,
    activation: str,
    dilation: int,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias, dinitial_states)."""
    call = _Call(x, weight, seq_idx, cu_seqlens, dilation)
    weight, bias, initial_states, dfinal_states = _dense(weight, bias, initial_states, dfinal_states)
    (D, W), dpre, empty = weight.shape, empty_in_layout_of(x, torch.float32), x.new_empty(0)
    partials = [
        torch.empty((1, call.blocks(dpre), columns), dtype=torch.float32, device=x.device) if asked else None
        for asked, columns in zip(output_mask[1:3], (D * W, D), strict=True)
    ]
    call.launch(
        dpre_kernel, dpre, dy, x, weight, bias, initial_states, *call.boundaries, dpre, *partials, *call.sizes,
        *dy.stride(), *x.stride(), *dpre.stride(), W, activation,
    )  # fmt: skip
    dweight, dbias = (empty if p is None else sum_partials(p, 1, weight.dtype)[0] for p in partials)
    dpre = call.by_sequence(dpre)

    def fill(out: Tensor, states: str) -> Tensor:
        call.launch(
            dx_kernel, out, dpre, weight, *call.boundaries, dfinal_states, out, out.shape[2], *call.sizes,
            *dpre.stride(), *out.stride(), W, states,
        )  # fmt: skip
        return out

    dx = fill(empty_in_layout_of(x), "none") if output_mask[0] else empty
    dinitial = fill(call.like_states(), "initial") if output_mask[3] else empty
    return dx, dweight.view(D, W) if output_mask[1] else empty, dbias, dinitial


def sweep(dtype: torch.dtype, full: bool) -> None:
    """Launches every kernel in every tile, for offline compilation: in the costliest form, or with `full` in all."""
    weight, bias, states = (torch.empty(size, dtype=dtype) for size in ((256, 4), (256,), (2, 256, 3)))
    index, bounds = torch.empty(2, 4096, dtype=torch.int32), torch.empty(3, dtype=torch.int32)
    splits = [(index, None), (None, bounds), (None, None)]
    for channels_last in TILES:
        for seq_idx, cu_seqlens in splits if full else splits[:1]:
            batch = 2 if cu_seqlens is None else 1
            x = torch.empty(batch, 4096, 256, dtype=dtype).mT
            x = x if channels_last else x.contiguous()
            args = x, weight, bias, states, seq_idx, cu_seqlens
            causal_conv1d(*args, "silu", 1, True)
            causal_conv1d_backward(x, *args, states, "silu", 1, [True] * 4)
