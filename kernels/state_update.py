"""Decoding steps of state space models, on states that advance in place: the selective scan's and the convolution's.

B batch elements, H heads of P channels of N states; D channels, W taps, L new steps, S steps kept. A program has some
channels of one batch element (and head). The result of a batch element that has no entry is zero.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import activate, exp
from .runtime import FP_FUSION, device_of, empty_in_layout_of, on_device, rounded, unsupported
from .scan_steps import softplus

__all__ = ["causal_conv1d_update", "selective_state_update", "unsupported"]


class Tile(NamedTuple):
    states: int  # of the scan's programs
    channels: int  # of the convolution's; of the scan's at most
    num_warps: int


# The smaller one where the larger would leave SMs without a program.
TILES = Tile(1024, 128, 4), Tile(256, 32, 1)
STEPS = 16  # of the convolution's programs at a time


@triton.jit
def entry_of(indices, batch, entries, count):
    """The batch element's entry of a state, whether there is one, and how many of its `count` places there are."""
    if indices is None:
        return batch, batch >= 0, count
    else:
        entry = tl.load(indices + batch).to(tl.int64)
        exists = (entry >= 0) & (entry < entries)
        return entry, exists, tl.where(exists, count, 0)


@triton.jit
def load_channels(x, mask):
    return tl.load(x, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def scan_update_kernel(
    x,  # (B, H, P)
    dt,  # (B, H, P)
    A,  # (H, P, N) float32
    B,  # (B, groups, N)
    C,  # (B, groups, N)
    D,  # (H, P) float32, or None
    z,  # (B, H, P) or None
    dt_bias,  # (H, P) float32, or None
    state,  # (entries, H, P, N)
    indices,  # (B,) int32 entries, or None: batch element i has entry i
    y,  # (B, H, P) contiguous
    entries,
    heads,
    heads_of_group,
    channels,  # P
    states,  # N
    stride_xb,  # elements from one to the next
    stride_xh,
    stride_xp,
    stride_tb,  # of dt
    stride_th,
    stride_tp,
    stride_ah,
    stride_ap,
    stride_an,
    stride_bb,
    stride_bg,
    stride_bn,
    stride_cb,
    stride_cg,
    stride_cn,
    stride_dh,
    stride_dp,
    stride_zb,
    stride_zh,
    stride_zp,
    stride_ih,  # of dt_bias
    stride_ip,
    stride_se,
    stride_sh,
    stride_sp,
    stride_sn,
    SOFTPLUS: tl.constexpr,
    BLOCK_P: tl.constexpr,  # channels of a program
    BLOCK_N: tl.constexpr,  # at least N
):
    blocks = tl.cdiv(channels, BLOCK_P)
    row = tl.program_id(0) // blocks
    batch, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    group = head // heads_of_group
    p = (tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    there = p < channels
    mask = there[:, None] & (n < states)[None, :]
    entry, exists, count = entry_of(indices, batch, entries, states)
    kept = there[:, None] & (n < count)[None, :]
    state += entry * stride_se + head * stride_sh + p[:, None] * stride_sp + n[None, :] * stride_sn
    h = tl.load(state, mask=kept, other=0.0).to(tl.float32)
    rate = tl.load(A + head * stride_ah + p[:, None] * stride_ap + n[None, :] * stride_an, mask=mask, other=0.0)
    inputs = tl.load(B + batch * stride_bb + group * stride_bg + n * stride_bn, mask=n < states, other=0.0)
    outputs = tl.load(C + batch * stride_cb + group * stride_cg + n * stride_cn, mask=n < states, other=0.0)
    value = load_channels(x + batch * stride_xb + head * stride_xh + p * stride_xp, there)
    step = load_channels(dt + batch * stride_tb + head * stride_th + p * stride_tp, there)
    if dt_bias is not None:
        step += load_channels(dt_bias + head * stride_ih + p * stride_ip, there)
    if SOFTPLUS:
        step = softplus(step)
    h = exp(step[:, None] * rate) * h + (step * value)[:, None] * inputs.to(tl.float32)[None, :]
    tl.store(state, rounded(h, state.dtype.element_ty), mask=kept)
    out = tl.sum(tl.where(mask, h * outputs.to(tl.float32)[None, :], 0.0), 1)
    if D is not None:
        out += load_channels(D + head * stride_dh + p * stride_dp, there) * value
    if z is not None:
        gate = load_channels(z + batch * stride_zb + head * stride_zh + p * stride_zp, there)
        out *= activate(gate, 0.0, 0.0, "silu")
    out = tl.where(exists, out, 0.0)
    tl.store(y + row.to(tl.int64) * channels + p, rounded(out, y.dtype.element_ty), mask=there)


@triton.jit
def conv_update_kernel(
    x,  # (B, D, L)
    weight,  # (D, W)
    bias,  # (D,) or None
    state,  # (entries, D, S)
    seen,  # (B,) int32: step t is kept at t % S; or None: the newest last
    indices,  # (B,) int32 entries, or None: batch element i has entry i
    y,  # (B, D, L)
    entries,
    channels,  # D
    steps,  # L
    length,  # S
    dilation,  # steps from tap to tap
    stride_xb,  # elements from one to the next
    stride_xd,
    stride_xl,
    stride_wd,
    stride_ww,
    stride_id,  # of bias
    stride_se,
    stride_sd,
    stride_ss,
    stride_yb,
    stride_yd,
    stride_yl,
    W: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_D: tl.constexpr,  # channels of a program
    BLOCK_L: tl.constexpr,  # new steps of a tile
    BLOCK_S: tl.constexpr,  # steps kept
):
    blocks = tl.cdiv(channels, BLOCK_D)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    d = (tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    there = (d < channels)[:, None]
    entry, exists, count = entry_of(indices, batch, entries, length)
    x += batch * stride_xb + d[:, None] * stride_xd
    y += batch * stride_yb + d[:, None] * stride_yd
    state += entry * stride_se + d[:, None] * stride_sd
    weight += d[:, None] * stride_wd
    places = tl.maximum(length, 1)
    oldest = batch * 0
    if seen is not None:
        oldest = (tl.load(seen + batch).to(tl.int64) % places + places) % places

    for tile in range(tl.cdiv(steps, BLOCK_L)):
        t = (tile * BLOCK_L + tl.arange(0, BLOCK_L)).to(tl.int64)[None, :]
        mask = there & (t < steps)
        acc = tl.full((BLOCK_D, BLOCK_L), 0.0, tl.float32)
        if bias is not None:
            acc += load_channels(bias + d[:, None] * stride_id, there)
        for k in range(W):
            before = t - (W - 1 - k) * dilation
            value = load_channels(x + before * stride_xl, mask & (before >= 0))
            place = (oldest + length + before) % places
            value += load_channels(state + place * stride_ss, mask & (before < 0) & (place < count))
            acc += value * load_channels(weight + k * stride_ww, there)
        acc = tl.where(exists, activate(acc, 0.0, 0.0, ACTIVATION), 0.0)
        tl.store(y + t * stride_yl, rounded(acc, y.dtype.element_ty), mask=mask)

    # The state's i-th step becomes the one that is `steps` after it. In a circular buffer only new ones are written.
    for tile in range(tl.cdiv(length, BLOCK_S)):
        i = (tile * BLOCK_S + tl.arange(0, BLOCK_S)).to(tl.int64)[None, :]
        mask = there & (i < count)
        after = i + steps
        value = tl.load(x + (after - length) * stride_xl, mask=mask & (after >= length), other=0.0)
        place = i
        if seen is not None:
            place = (oldest + after) % places
            mask &= after >= length
        else:
            stays = after < length
            value = tl.where(stays, tl.load(state + after * stride_ss, mask=mask & stays, other=0.0), value)
        tl.debug_barrier()  # all is read that other threads write
        tl.store(state + place * stride_ss, value, mask=mask)


def tile_for(x: Tensor, rows: int, channels: int, states: int) -> tuple[int, int]:
    """Channels of a program, if each has so many states, and warps; the rows have so many channels."""
    for tile in TILES:
        block = min(tile.channels, tile.states // states)
        if rows * triton.cdiv(channels, block) >= device_of(x).num_sms:
            break
    return block, tile.num_warps


def strides(x: Tensor | None, rank: int) -> tuple[int, ...]:
    return (0,) * rank if x is None else x.stride()


@on_device
def selective_state_update(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
    state_batch_indices: Tensor | None,
    dt_softplus: bool,
) -> Tensor:
    """y (batch, nheads, head_dim), contiguous; the state advances."""
    (batch, heads, channels), states = x.shape, A.shape[2]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    indices = None if state_batch_indices is None else state_batch_indices.contiguous()
    block_n = triton.next_power_of_2(max(1, states))
    block_p, num_warps = tile_for(x, batch * heads, channels, block_n)
    scan_update_kernel[(batch * heads * triton.cdiv(channels, block_p),)](
        x, dt, A, B, C, D, z, dt_bias, state, indices, y, state.shape[0], heads, heads // B.shape[1], channels, states,
        *x.stride(), *dt.stride(), *A.stride(), *B.stride(), *C.stride(), *strides(D, 2), *strides(z, 3),
        *strides(dt_bias, 2), *state.stride(), dt_softplus, block_p, block_n,
        num_warps=num_warps, enable_fp_fusion=FP_FUSION,
    )  # fmt: skip
    return y


@on_device
def causal_conv1d_update(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv_state: Tensor,
    cache_seqlens: Tensor | None,
    conv_state_indices: Tensor | None,
    activation: str,
    dilation: int,
) -> Tensor:
    """y (batch, dim, seqlen), in x's layout; the state takes up x."""
    (batch, channels, steps), (entries, _, length) = x.shape, conv_state.shape
    y = empty_in_layout_of(x)
    if batch * channels == 0:
        return y
    seen, indices = (None if i is None else i.contiguous() for i in (cache_seqlens, conv_state_indices))
    block_l, block_s = (min(STEPS, triton.next_power_of_2(max(1, size))) for size in (steps, length))
    block_d, num_warps = tile_for(x, batch, channels, 1)
    conv_update_kernel[(batch * triton.cdiv(channels, block_d),)](
        x, weight, bias, conv_state, seen, indices, y, entries, channels, steps, length, dilation,
        *x.stride(), *weight.stride(), *strides(bias, 1), *conv_state.stride(), *y.stride(),
        weight.shape[1], activation, block_d, block_l, block_s, num_warps=num_warps, enable_fp_fusion=FP_FUSION,
    )  # fmt: skip
    return y


def sweep(dtype: torch.dtype, full: bool) -> None:
    """Launches every kernel in every tile, for offline compilation: in the costliest form, or with `full` in all."""
    indices = torch.empty(256, dtype=torch.int32)
    for batch in (1, 256):
        entries = indices[:batch] if full else None
        for states in (16, 128, 256) if full else (16, 128):
            x = torch.empty(batch, 2, 512, dtype=dtype)
            A, D, B = torch.empty(2, 512, states), torch.empty(2, 512), torch.empty(batch, 1, states, dtype=dtype)
            for state_dtype in {dtype, torch.float32}:
                state = torch.empty(batch, 2, 512, states, dtype=state_dtype)
                selective_state_update(x, x, A, B, B, D, x, D, state, entries, True)
        for steps in (1, STEPS) if full else (1,):
            x, state = torch.empty(batch, 512, steps, dtype=dtype), torch.empty(batch, 512, 4, dtype=dtype)
            weight, bias = torch.empty(512, 4, dtype=dtype), torch.empty(512, dtype=dtype)
            for seen in (None, indices[:batch]) if full else (None,):
                causal_conv1d_update(x, weight, bias, state, seen, entries, "silu", 1)
