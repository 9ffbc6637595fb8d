"""The linear recurrence h[t] = a[t] h[t-1] + b[t] of B x D channels over L steps, real or complex.

One program takes CHANNELS channels through all steps, STEPS at a time by an associative scan; the state goes from one
tile to the next in registers. Complex numbers are loaded and stored as the 64 bits that they are.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .runtime import FP_FUSION, empty_in_layout_of, on_device, rounded, unsupported

__all__ = ["linear_scan", "linear_scan_backward", "unsupported"]


class Tile(NamedTuple):
    channels: int
    steps: int
    num_warps: int


ALONG_STEPS = Tile(4, 256, 4)  # steps are adjacent in memory
ALONG_CHANNELS = Tile(32, 32, 4)  # else
COMPLEX_ALONG_CHANNELS = Tile(16, 32, 4)  # the wider one spills in the backward with Triton 3.6


@triton.jit
def multiply(xr, xi, yr, yi, COMPLEX: tl.constexpr):
    """x y; xi and yi play no part where real."""
    if COMPLEX:
        return xr * yr - xi * yi, xr * yi + xi * yr
    else:
        return xr * yr, xi


@triton.jit
def combine(a0, b0, a1, b1):
    return a0 * a1, b0 * a1 + b1


@triton.jit
def combine_complex(ar0, ai0, br0, bi0, ar1, ai1, br1, bi1):
    ar, ai = multiply(ar0, ai0, ar1, ai1, True)
    br, bi = multiply(br0, bi0, ar1, ai1, True)
    return ar, ai, br + br1, bi + bi1


@triton.jit
def recur(ar, ai, br, bi, hr, hi, BACKWARDS: tl.constexpr, COMPLEX: tl.constexpr):
    """The states after each step of a tile (CHANNELS, STEPS), and after its last, from h (CHANNELS,) before it."""
    steps: tl.constexpr = ar.shape[1]
    first = tl.arange(0, steps)[None, :] == (steps - 1 if BACKWARDS else 0)
    last = tl.arange(0, steps)[None, :] == (0 if BACKWARDS else steps - 1)
    cr, ci = multiply(ar, ai, hr[:, None], hi[:, None], COMPLEX)
    br += tl.where(first, cr, 0.0)
    if COMPLEX:
        bi += tl.where(first, ci, 0.0)
        _, _, br, bi = tl.associative_scan((ar, ai, br, bi), 1, combine_complex, BACKWARDS)
    else:
        _, br = tl.associative_scan((ar, br), 1, combine, BACKWARDS)
    return br, bi, tl.sum(tl.where(last, br, 0.0), 1), tl.sum(tl.where(last, bi, 0.0), 1)


@triton.jit
def load(x, offsets, mask, other: tl.constexpr, COMPLEX: tl.constexpr):
    """Elements of x in float32, the real and the imaginary part; 0 or 1 where masked. Real ones twice."""
    if COMPLEX:
        pair = tl.load(x + offsets, mask=mask, other=0x3F800000 if other == 1 else 0)
        imaginary = (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        return pair.to(tl.int32).to(tl.float32, bitcast=True), imaginary
    else:
        value = tl.load(x + offsets, mask=mask, other=other).to(tl.float32)
        return value, value


@triton.jit
def store(x, offsets, real, imaginary, mask, COMPLEX: tl.constexpr):
    if COMPLEX:
        low = real.to(tl.uint32, bitcast=True).to(tl.int64)
        tl.store(x + offsets, low | imaginary.to(tl.int32, bitcast=True).to(tl.int64) << 32, mask=mask)
    else:
        tl.store(x + offsets, rounded(real, x.dtype.element_ty), mask=mask)


@triton.jit
def block(D, CHANNELS: tl.constexpr):
    """This program's batch element and channels."""
    blocks = tl.cdiv(D, CHANNELS)
    pid = tl.program_id(0).to(tl.int64)
    return pid // blocks, pid % blocks * CHANNELS + tl.arange(0, CHANNELS)


@triton.jit
def steps_of(tile, L, STEPS: tl.constexpr, BACKWARDS: tl.constexpr):
    """The steps (1, STEPS) of the tile, which are counted from the last steps where it goes backwards."""
    if BACKWARDS:
        tile = tl.cdiv(L, STEPS) - 1 - tile
    return (tile * STEPS + tl.arange(0, STEPS).to(tl.int64))[None, :]


@triton.jit
def start(initial, offsets, there, COMPLEX: tl.constexpr):
    """The states before the first step."""
    if initial is None:
        zeros = tl.zeros(offsets.shape, tl.float32)
        return zeros, zeros
    else:
        return load(initial, offsets, there, 0.0, COMPLEX)


@triton.jit
def linear_scan_kernel(
    a,  # (B, D, L)
    b,  # (B, D, L)
    initial,  # (B, D) contiguous, of the states' type, or None: zeros
    h,  # (B, D, L)
    D,  # channels
    L,  # steps
    stride_ab,  # elements from one batch element, channel and step of a to the next
    stride_ad,
    stride_al,
    stride_bb,  # the same of b
    stride_bd,
    stride_bl,
    stride_hb,  # the same of h
    stride_hd,
    stride_hl,
    REVERSE: tl.constexpr,  # from the last step to the first
    COMPLEX: tl.constexpr,  # all tensors are pairs of float32, seen as int64
    CHANNELS: tl.constexpr,  # channels of one program
    STEPS: tl.constexpr,  # steps of one tile
):
    batch, d = block(D, CHANNELS)
    there = d < D
    hr, hi = start(initial, batch * D + d, there, COMPLEX)
    for tile in range(tl.cdiv(L, STEPS)):
        t = steps_of(tile, L, STEPS, REVERSE)
        mask = there[:, None] & (t < L)
        ar, ai = load(a, batch * stride_ab + d[:, None] * stride_ad + t * stride_al, mask, 1.0, COMPLEX)
        br, bi = load(b, batch * stride_bb + d[:, None] * stride_bd + t * stride_bl, mask, 0.0, COMPLEX)
        sr, si, hr, hi = recur(ar, ai, br, bi, hr, hi, REVERSE, COMPLEX)
        store(h, batch * stride_hb + d[:, None] * stride_hd + t * stride_hl, sr, si, mask, COMPLEX)


@triton.jit
def linear_scan_backward_kernel(
    dh,  # (B, D, L)
    a,  # (B, D, L)
    h,  # (B, D, L), or None: no da
    initial,  # (B, D) contiguous, of the states' type, or None: zeros
    da,  # (B, D, L), or None
    db,  # (B, D, L), or None
    dinitial,  # (B, D) contiguous, or None
    D,  # channels
    L,  # steps, at least one
    stride_gb,  # elements from one batch element, channel and step of dh to the next
    stride_gd,
    stride_gl,
    stride_ab,  # the same of a
    stride_ad,
    stride_al,
    stride_hb,  # the same of h
    stride_hd,
    stride_hl,
    stride_xb,  # the same of da
    stride_xd,
    stride_xl,
    stride_yb,  # the same of db
    stride_yd,
    stride_yl,
    REVERSE: tl.constexpr,  # the forward went from the last step to the first
    COMPLEX: tl.constexpr,  # all tensors are pairs of float32, seen as int64
    CHANNELS: tl.constexpr,  # channels of one program
    STEPS: tl.constexpr,  # steps of one tile
):
    batch, d = block(D, CHANNELS)
    there = d < D
    first_r, first_i = start(initial, batch * D + d, there, COMPLEX)
    gr, gi = start(None, d, there, COMPLEX)
    first = tl.full((), L - 1 if REVERSE else 0, tl.int64)  # in the forward's order
    before: tl.constexpr = 1 if REVERSE else -1  # from a step to the one that the forward took before it
    for tile in range(tl.cdiv(L, STEPS)):
        t = steps_of(tile, L, STEPS, not REVERSE)
        mask = there[:, None] & (t < L)
        following = mask & (t != L - 1 - first)
        ar, ai = load(a, batch * stride_ab + d[:, None] * stride_ad + (t - before) * stride_al, following, 1.0, COMPLEX)
        br, bi = load(dh, batch * stride_gb + d[:, None] * stride_gd + t * stride_gl, mask, 0.0, COMPLEX)
        xr, xi, gr, gi = recur(ar, -ai, br, bi, gr, gi, not REVERSE, COMPLEX)
        if db is not None:
            store(db, batch * stride_yb + d[:, None] * stride_yd + t * stride_yl, xr, xi, mask, COMPLEX)
        if da is not None:
            offsets = batch * stride_hb + d[:, None] * stride_hd + (t + before) * stride_hl
            hr, hi = load(h, offsets, mask & (t != first), 0.0, COMPLEX)
            hr = tl.where(t == first, first_r[:, None], hr)
            hi = tl.where(t == first, first_i[:, None], hi)
            yr, yi = multiply(xr, xi, hr, -hi, COMPLEX)
            store(da, batch * stride_xb + d[:, None] * stride_xd + t * stride_xl, yr, yi, mask, COMPLEX)
    if dinitial is not None:
        ar, ai = load(a, batch * stride_ab + d * stride_ad + first * stride_al, there, 0.0, COMPLEX)
        gr, gi = multiply(gr, gi, ar, -ai, COMPLEX)
        store(dinitial, batch * D + d, gr, gi, there, COMPLEX)


def _bits(x: Tensor | None) -> Tensor | None:
    """What the kernels see of x: of complex64 the pairs' bits."""
    return x.resolve_conj().view(torch.int64) if x is not None and x.is_complex() else x


def _tile(a: Tensor) -> Tile:
    if a.stride(2) == 1:
        return ALONG_STEPS
    return COMPLEX_ALONG_CHANNELS if a.is_complex() else ALONG_CHANNELS


@on_device
def linear_scan(a: Tensor, b: Tensor, initial_state: Tensor | None, reverse: bool) -> Tensor:
    """h (batch, dim, seqlen) of h[t] = a[t] h[t-1] + b[t], or of h[t] = a[t] h[t+1] + b[t] with `reverse`."""
    B, D, L = a.shape
    h = empty_in_layout_of(b)
    if h.numel() == 0:
        return h
    initial = None if initial_state is None else initial_state.contiguous()
    tile = _tile(a)
    linear_scan_kernel[(B * triton.cdiv(D, tile.channels),)](
        _bits(a), _bits(b), _bits(initial), _bits(h), D, L, *a.stride(), *b.stride(), *h.stride(),
        reverse, a.is_complex(), tile.channels, tile.steps,
        num_warps=tile.num_warps, enable_fp_fusion=FP_FUSION,
    )  # fmt: skip
    return h


@on_device
def linear_scan_backward(
    dh: Tensor, a: Tensor, h: Tensor, initial_state: Tensor | None, reverse: bool, output_mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """(da, db, dinitial_state) of :func:`linear_scan`, empty where not asked for."""
    B, D, L = a.shape
    absent = a.new_empty(0)
    da = empty_in_layout_of(a) if output_mask[0] else absent
    db = empty_in_layout_of(h) if output_mask[1] else absent
    state = a.dtype if a.is_complex() else torch.float32
    dinitial = torch.zeros(B, D, dtype=state, device=a.device) if output_mask[2] else absent
    if a.numel() == 0:
        return da, db, dinitial
    initial = None if initial_state is None else initial_state.contiguous()
    tile = _tile(a)
    outputs = (_bits(x) if asked else None for x, asked in zip((da, db, dinitial), output_mask, strict=True))
    strides = (x.stride() if x.dim() == 3 else (0, 0, 0) for x in (da, db))
    linear_scan_backward_kernel[(B * triton.cdiv(D, tile.channels),)](
        _bits(dh), _bits(a), _bits(h), _bits(initial), *outputs, D, L,
        *dh.stride(), *a.stride(), *h.stride(), *next(strides), *next(strides),
        reverse, a.is_complex(), tile.channels, tile.steps,
        num_warps=tile.num_warps, enable_fp_fusion=FP_FUSION,
    )  # fmt: skip
    return da, db, dinitial


def sweep(dtype: torch.dtype, full: bool) -> None:
    """Launches every kernel in every tile, for offline compilation: in the costliest form, or with `full` in all."""
    types = (dtype, torch.complex64) if dtype == torch.float32 else (dtype,)
    for kind in types:
        steps = torch.empty(2, 256, 4096, dtype=kind)
        state = torch.empty(2, 256, dtype=kind if kind.is_complex else torch.float32)
        for x in (steps, steps.mT.contiguous().mT):
            linear_scan(x, x, state, False)
            linear_scan_backward(x, x, x, state, False, [True, True, True])
            if full:
                linear_scan(x, x, None, True)
                linear_scan_backward(x, x, x, None, True, [True, True, False])
