"""Selective scan of B sequences of D channels, N states and L steps: h[t] = exp(delta A) h[t-1] + delta u B, y = C . h.

A program goes through the steps of one sequence and a block of channels in tiles (T, D, N), each an associative scan
over T, which is in the registers of one thread. Too few sequences and channels for all SMs leave some idle.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import LOG2E, activate
from .runtime import FP_FUSION, empty_in_layout_of, on_device, unsupported
from .scan_backward import selective_scan_backward
from .scan_steps import (
    BLOCK_D,
    BLOCK_N,
    FORWARD_T,
    NUM_WARPS,
    at_step,
    bounds_of,
    chunk_length,
    contiguous,
    decays,
    groups_of,
    load_coefficient,
    load_sizes,
    load_steps,
    states_after,
    states_from,
    store_steps,
    strides_of,
)

__all__ = ["selective_scan", "selective_scan_backward", "unsupported"]


@triton.jit(do_not_specialize=["steps"])
def scan_kernel(
    u,  # (B, D, L)
    delta,  # (B, D, L)
    A,  # (D, N) float32
    B,  # (B, groups, N, L), or (D, N) float32
    C,  # the same
    D,  # (D,) float32 or None
    z,  # (B, D, L) or None
    delta_bias,  # (D,) float32 or None
    cu_seqlens,  # (sequences + 1,) or None: every batch element is a sequence
    y,  # (B, D, L)
    last,  # (sequences, D, N) float32: the initial states, which become the last ones
    checkpoints,  # (B, chunks, D, N) float32: the states before every chunk, or None
    dim,  # D
    steps,  # L
    states,  # N
    groups,  # of channels, each with its B and C
    chunk,  # steps from one checkpoint to the next
    stride_ub,
    stride_ud,
    stride_ut,
    stride_deltab,
    stride_deltad,
    stride_deltat,
    stride_Bb,
    stride_Bg,
    stride_Bn,
    stride_Bt,
    stride_Cb,
    stride_Cg,
    stride_Cn,
    stride_Ct,
    stride_zb,
    stride_zd,
    stride_zt,
    stride_yb,
    stride_yd,
    stride_yt,
    VARIES_B: tl.constexpr,  # whether B varies over steps
    VARIES_C: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    BLOCK_T: tl.constexpr,  # steps of a tile
    BLOCK_D: tl.constexpr,  # channels of a program
    BLOCK_N: tl.constexpr,  # states at a time
):
    of_group = dim // groups
    blocks = tl.cdiv(of_group, BLOCK_D)
    sequence = (tl.program_id(0) // (blocks * groups)).to(tl.int64)
    group = (tl.program_id(0) // blocks % groups).to(tl.int64)
    d = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = d < of_group
    d = (group * of_group + d).to(tl.int64)
    batch, begin, end = bounds_of(cu_seqlens, sequence, steps)
    u += batch * stride_ub
    delta += batch * stride_deltab
    B += batch * stride_Bb + group * stride_Bg
    C += batch * stride_Cb + group * stride_Cg
    y += batch * stride_yb
    last += sequence * dim * states

    for start in range(begin // BLOCK_T * BLOCK_T, end, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        inside = (t >= begin) & (t < end)
        mask = inside[:, None] & mask_d[None, :]
        step = load_sizes(delta, delta_bias, t, d, stride_deltat, stride_deltad, mask, mask_d, SOFTPLUS)[0]
        x = load_steps(u, t, d, stride_ut, stride_ud, mask)
        out = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        if D is not None:
            out += tl.load(D + d, mask=mask_d, other=0.0)[None, :] * x
        tl.debug_barrier()  # the states that the tile before left are there
        for first in range(0, states, BLOCK_N):
            n = first + tl.arange(0, BLOCK_N)
            mask_n = n < states
            mask_state = mask_d[:, None] & mask_n[None, :]
            offs_state = d[:, None] * states + n[None, :]
            h = tl.load(last + offs_state, mask=mask_state, other=0.0)
            if checkpoints is not None:
                if start % chunk == 0 and start >= begin:
                    row = batch * tl.cdiv(steps, chunk) + start // chunk
                    tl.store(checkpoints + row * dim * states + offs_state, h, mask=mask_state)
            rate = tl.load(A + offs_state, mask=mask_state, other=0.0) * LOG2E
            b = load_coefficient(B, t, d, n, stride_Bt, stride_Bn, inside, mask_d, mask_n, states, VARIES_B)
            c = load_coefficient(C, t, d, n, stride_Ct, stride_Cn, inside, mask_d, mask_n, states, VARIES_C)
            decay = decays(step, rate, inside)
            after = states_after(h, decay, (step * x)[:, :, None] * b)
            out += tl.sum(after * c, 2)
            tl.store(last + offs_state, at_step(after, BLOCK_T - 1), mask=mask_state)
        if z is not None:
            out *= activate(load_steps(z + batch * stride_zb, t, d, stride_zt, stride_zd, mask), 0.0, 0.0, "silu")
        store_steps(y, out, t, d, stride_yt, stride_yd, mask)


@on_device
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    delta_softplus: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, last_state, checkpoints) of u (batch, dim, steps), channels-last in memory if u is."""
    batch, dim, steps = u.shape
    states = A.shape[1]
    groups, chunk = groups_of(B, C), chunk_length(states)
    y = empty_in_layout_of(u)
    last = states_from(initial_state, A, batch, cu_seqlens)
    shape = (batch, triton.cdiv(steps, chunk) * dim, states) if save else (0,)
    checkpoints = torch.empty(shape, dtype=torch.float32, device=u.device)
    B, C = (x if x.dim() == 4 else x.contiguous() for x in (B, C))
    # fmt: off
    scan_kernel[(last.shape[0] * groups * triton.cdiv(dim // groups, BLOCK_D),)](
        u, delta, A.contiguous(), B, C, contiguous(D), z, contiguous(delta_bias), contiguous(cu_seqlens),
        y, last, checkpoints if save else None, dim, steps, states, groups, chunk,
        *u.stride(), *delta.stride(), *strides_of(B, 4), *strides_of(C, 4), *strides_of(z, 3), *y.stride(),
        B.dim() == 4, C.dim() == 4, delta_softplus, FORWARD_T, BLOCK_D, BLOCK_N,
        num_warps=NUM_WARPS, enable_fp_fusion=FP_FUSION,
    )
    # fmt: on
    return y, last, checkpoints


def sweep(dtype: torch.dtype, full: bool) -> None:
    """Launches the kernel for offline compilation: in the costliest form, or with `full` in others."""
    u, D = torch.empty(2, 256, 64, dtype=dtype).mT, torch.empty(64)
    A, B, h = torch.empty(64, 16), torch.empty(2, 1, 256, 16, dtype=dtype).mT, torch.empty(2, 64, 16)
    selective_scan(u, u, A, B, B, D, u, D, h, None, True, True)
    if full:
        bounds = torch.empty(3, dtype=torch.int32)
        selective_scan(u[:1], u[:1], A, A, A, None, None, None, None, bounds, False, False)
