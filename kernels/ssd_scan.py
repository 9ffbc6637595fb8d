"""Mamba-2's scan: S[t] = exp(dt A) S[t-1] + dt x B^T and y[t] = S[t] C + D x, in chunks of Q steps (ssd_tiles.py).

Passes: step sizes; what each chunk adds to the state; the states before all chunks, sequences and heads side by side;
and here y, of which a program has a chunk of one head and a block of its channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import activate
from .runtime import on_device, unsupported
from .scan_steps import strides_of
from .ssd_scan_backward import ssd_scan_backward
from .ssd_tiles import (
    CHUNK,
    DECAY,
    DT,
    PLANES,
    Passes,
    Tiles,
    chunk_of,
    decay_within,
    dot,
    load_plane,
    load_tile,
    narrow,
    skip_strides,
    store_tile,
)

TILES = {
    "tf32x3": (Tiles(64, 64, 8, 2), Tiles(64, 64, 8, 2)),
    "tf32": (Tiles(64, 32, 8, 2), Tiles(64, 32, 8, 2)),
    "ieee": (Tiles(32, 32, 8, 2), Tiles(32, 32, 8, 2)),
}
__all__ = ["ssd_scan", "ssd_scan_backward", "unsupported"]


@triton.jit(do_not_specialize=["steps"])
def ssd_scan_kernel(
    x,  # (B, L, H, P)
    B,  # (B, L, G, N)
    C,  # (B, L, G, N)
    D,  # (H, P) float32 or None
    z,  # (B, L, H, P) or None
    cu_seqlens,  # (sequences + 1,) or None: every batch element is a sequence
    per_step,  # (slots, H, PLANES, Q) float32
    states,  # (slots, H, P, N) float32: before each chunk
    y,  # (B, L, H, P)
    heads,  # H
    of_group,  # heads of a group
    headdim,  # P
    dstate,  # N
    steps,  # L
    sequences,
    stride_xb,
    stride_xt,
    stride_xh,
    stride_xp,
    stride_Bb,
    stride_Bt,
    stride_Bg,
    stride_Bn,
    stride_Cb,
    stride_Ct,
    stride_Cg,
    stride_Cn,
    stride_Dh,
    stride_Dp,
    stride_zb,
    stride_zt,
    stride_zh,
    stride_zp,
    stride_yb,
    stride_yt,
    stride_yh,
    PRECISION: tl.constexpr,  # of the products
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    slot, head = tl.program_id(0) // heads, (tl.program_id(0) % heads).to(tl.int64)
    batch, begin, end = chunk_of(slot, cu_seqlens, steps, sequences)
    if end <= begin:
        return
    dtype: tl.constexpr = x.dtype.element_ty
    p = (tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)
    in_chunk = tl.arange(0, CHUNK)
    t = (begin + in_chunk).to(tl.int64)
    inside, mask_p = t < end, p < headdim
    of_head = slot.to(tl.int64) * heads + head
    per_step += of_head * PLANES * CHUNK
    states += of_head * headdim * dstate
    B += batch * stride_Bb + head // of_group * stride_Bg
    C += batch * stride_Cb + head // of_group * stride_Cg

    products = tl.zeros((CHUNK, CHUNK), tl.float32)  # C[t] . B[s]
    out = tl.zeros((CHUNK, BLOCK_P), tl.float32)
    for first in range(0, dstate, BLOCK_N):
        n = (first + tl.arange(0, BLOCK_N)).to(tl.int64)
        mask_n = n < dstate
        c = load_tile(C, t, n, stride_Ct, stride_Cn, inside, mask_n)
        b = load_tile(B, t, n, stride_Bt, stride_Bn, inside, mask_n)
        products = dot(c, tl.trans(b), products, PRECISION)
        state = load_tile(states, p, n, dstate, 1, mask_p, mask_n)
        out = dot(c, tl.trans(narrow(state, dtype)), out, PRECISION)
    out *= load_plane(per_step, DECAY, in_chunk)[:, None]
    matrix = decay_within(products, per_step) * load_plane(per_step, DT, in_chunk)[None, :]
    values = load_tile(x + batch * stride_xb + head * stride_xh, t, p, stride_xt, stride_xp, inside, mask_p)
    out = dot(narrow(matrix, dtype), values, out, PRECISION)
    if D is not None:
        skip = tl.load(D + head * stride_Dh + p * stride_Dp, mask=mask_p, other=0.0)
        out += skip[None, :] * values
    if z is not None:
        gate = load_tile(z + batch * stride_zb + head * stride_zh, t, p, stride_zt, stride_zp, inside, mask_p)
        out *= activate(gate.to(tl.float32), 0.0, 0.0, "silu")
    store_tile(y + batch * stride_yb + head * stride_yh, out, t, p, stride_yt, 1, inside, mask_p)


@on_device
def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
) -> tuple[Tensor, Tensor]:
    """(y, final_states), both contiguous."""
    passes = Passes(x, dt, A, B, dt_bias, cu_seqlens, dt_softplus, dt_min, dt_max)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    final = passes.float32(passes.sequences, *x.shape[2:], passes.dstate)
    states = passes.states(x, None, B, initial_states, final, False)
    tiles = passes.tiles(TILES)
    ssd_scan_kernel[(passes.slots * passes.heads, triton.cdiv(passes.headdim, tiles.block_p))](
        x, B, C, D, z, passes.cu_seqlens, passes.per_step, states, y,
        passes.heads, passes.of_group, passes.headdim, passes.dstate, passes.steps, passes.sequences,
        *x.stride(), *B.stride(), *C.stride(), *skip_strides(D), *strides_of(z, 4), *y.stride()[:3],
        passes.cheaper, tiles.block_p, tiles.block_n, **tiles.options(),
    )  # fmt: skip
    return y, final


def sweep(dtype: torch.dtype, full: bool) -> None:
    """Launches the kernels for offline compilation: in the costliest form, or with `full` in others."""
    before = torch.get_float32_matmul_precision()
    for precision in ("highest", "high") if dtype == torch.float32 else (before,):
        torch.set_float32_matmul_precision(precision)
        x, B = torch.empty(2, 256, 16, 64, dtype=dtype), torch.empty(2, 256, 2, 128, dtype=dtype)
        A, D, h = torch.empty(16), torch.empty(16, 64), torch.empty(2, 16, 64, 128)
        ssd_scan(x, x[..., 0], A, B, B, D, x, A, h, None, True, 0.0, 1.0)
        if full:
            bounds = torch.empty(3, dtype=torch.int32)
            ssd_scan(x[:1], x[:1, ..., 0], A, B[:1], B[:1], None, x[:1], None, None, bounds, False, 0.0, 1.0)
    torch.set_float32_matmul_precision(before)
