"""Gradients of Mamba-2's step sizes and of A, a chunk of Q steps of one head in a program (ssd_tiles.py).

That of dt[t] A is the sum, over all pairs of a step before t that writes to the state and a step from t on that reads
it, of what the pair contributes: pairs inside the chunk, those with one step outside, those with both.
"""

import triton
import triton.language as tl

from .runtime import rounded
from .ssd_tiles import (
    CHUNK,
    DECAY,
    DT,
    PLANES,
    REST,
    SLOPE,
    Tiles,
    chunk_of,
    decay_within,
    dot,
    load_gated,
    load_plane,
    load_tile,
)

TILES = {
    "tf32x3": (Tiles(32, 32, 8, 2), Tiles(32, 32, 8, 2)),
    "tf32": (Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 1)),
    "ieee": (Tiles(32, 16, 8, 1), Tiles(32, 16, 8, 1)),
}


@triton.jit(do_not_specialize=["steps"])
def ssd_pairs_kernel(
    dy,  # (B, L, H, P)
    x,  # (B, L, H, P)
    A,  # (H,) float32
    B,  # (B, L, G, N)
    C,  # (B, L, G, N)
    z,  # (B, L, H, P) or None
    cu_seqlens,  # (sequences + 1,) or None: every batch element is a sequence
    per_step,  # (slots, H, PLANES, Q) float32
    states,  # (slots, H, P, N) float32: before each chunk
    dstates,  # (slots, H, P, N) float32: gradients of those after each chunk
    ddt,  # (B, L, H), as all that follow None where it is not asked for
    dA,  # (slots, H) float32 sums over a chunk
    ddt_bias,  # (slots, H) float32
    heads,  # H
    of_group,  # heads of a group
    headdim,  # P
    dstate,  # N
    steps,  # L
    sequences,
    stride_dyb,
    stride_dyt,
    stride_dyh,
    stride_dyp,
    stride_xb,
    stride_xt,
    stride_xh,
    stride_xp,
    stride_A,
    stride_Bb,
    stride_Bt,
    stride_Bg,
    stride_Bn,
    stride_Cb,
    stride_Ct,
    stride_Cg,
    stride_Cn,
    stride_zb,
    stride_zt,
    stride_zh,
    stride_zp,
    PRECISION: tl.constexpr,  # of the products
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    slot, head = tl.program_id(0) // heads, (tl.program_id(0) % heads).to(tl.int64)
    batch, begin, end = chunk_of(slot, cu_seqlens, steps, sequences)
    if end <= begin:
        return
    in_chunk = tl.arange(0, CHUNK)
    t = (begin + in_chunk).to(tl.int64)
    inside = t < end
    of_head = slot.to(tl.int64) * heads + head
    per_step += of_head * PLANES * CHUNK
    states += of_head * headdim * dstate
    dstates += of_head * headdim * dstate
    dy += batch * stride_dyb + head * stride_dyh
    x += batch * stride_xb + head * stride_xh
    B += batch * stride_Bb + head // of_group * stride_Bg
    C += batch * stride_Cb + head // of_group * stride_Cg
    if z is not None:
        z += batch * stride_zb + head * stride_zh
    size = load_plane(per_step, DT, in_chunk)

    products = tl.zeros((CHUNK, CHUNK), tl.float32)  # C[t] . B[s]
    for first in range(0, dstate, BLOCK_N):
        n = (first + tl.arange(0, BLOCK_N)).to(tl.int64)
        c = load_tile(C, t, n, stride_Ct, stride_Cn, inside, n < dstate)
        b = load_tile(B, t, n, stride_Bt, stride_Bn, inside, n < dstate)
        products = dot(c, tl.trans(b), products, PRECISION)
    matrix = decay_within(products, per_step)

    # Pairs inside the chunk. No sum has a pair that does not count, so that none has to cancel.
    dmatrix = tl.zeros((CHUNK, CHUNK), tl.float32)  # dy[t] . x[s]
    for first in range(0, headdim, BLOCK_P):
        p = (first + tl.arange(0, BLOCK_P)).to(tl.int64)
        mask_p = p < headdim
        dout = load_gated(dy, z, t, p, stride_dyt, stride_dyp, stride_zt, stride_zp, inside, mask_p)
        values = load_tile(x, t, p, stride_xt, stride_xp, inside, mask_p)
        dmatrix = dot(dout, tl.trans(values), dmatrix, PRECISION)
    pairs = matrix * dmatrix
    dsize = tl.sum(pairs, 0)
    earlier = in_chunk[None, :] < in_chunk[:, None]
    pairs = tl.cumsum(tl.where(earlier, pairs * size[None, :], 0.0), 0, reverse=True)
    dexponent = tl.sum(tl.where(earlier, pairs, 0.0), 1)
    before = tl.zeros((CHUNK,), tl.float32)  # pairs of a step before the chunk and t
    after = tl.zeros((CHUNK,), tl.float32)  # pairs of t and a step after the chunk, over dt[t]
    both = 0.0  # of a step before and one after

    for first_p in range(0, headdim, BLOCK_P):
        p = (first_p + tl.arange(0, BLOCK_P)).to(tl.int64)
        mask_p = p < headdim
        read = tl.zeros((CHUNK, BLOCK_P), tl.float32)  # S C[t]
        dwritten = tl.zeros((CHUNK, BLOCK_P), tl.float32)  # dS B[t]
        for first_n in range(0, dstate, BLOCK_N):
            n = (first_n + tl.arange(0, BLOCK_N)).to(tl.int64)
            mask_n = n < dstate
            c = load_tile(C, t, n, stride_Ct, stride_Cn, inside, mask_n)
            state = load_tile(states, p, n, dstate, 1, mask_p, mask_n)
            read = dot(c, tl.trans(state), read, PRECISION)
            b = load_tile(B, t, n, stride_Bt, stride_Bn, inside, mask_n)
            dstate_after = load_tile(dstates, p, n, dstate, 1, mask_p, mask_n)
            dwritten = dot(b, tl.trans(dstate_after), dwritten, PRECISION)
            both += tl.sum(tl.sum(state * dstate_after, 1), 0)
        dout = load_gated(dy, z, t, p, stride_dyt, stride_dyp, stride_zt, stride_zp, inside, mask_p)
        before += tl.sum(read * dout, 1)
        values = load_tile(x, t, p, stride_xt, stride_xp, inside, mask_p)
        after += tl.sum(dwritten * values, 1)

    before *= load_plane(per_step, DECAY, in_chunk)
    after *= load_plane(per_step, REST, in_chunk)
    dsize += after
    written = (after * size).to(tl.float64)
    exponents = tl.cumsum(before.to(tl.float64), 0, reverse=True) + (tl.cumsum(written, 0) - written)
    exponents += dexponent + both * load_plane(per_step, DECAY, CHUNK - 1)
    rate = tl.load(A + head * stride_A)
    dsize = (exponents * rate + dsize).to(tl.float32) * load_plane(per_step, SLOPE, in_chunk)
    dsize = tl.where(inside, dsize, 0.0)
    if ddt is not None:
        offs = (batch * steps + t) * heads + head
        tl.store(ddt + offs, rounded(dsize, ddt.dtype.element_ty), mask=inside)
    # As sums of a row: those of a vector Triton 3.6 does not compile where tcgen05 multiplies.
    one = tl.arange(0, 1)
    if dA is not None:
        tl.store(dA + of_head + one, tl.sum((exponents * size)[None, :], 1).to(tl.float32))
    if ddt_bias is not None:
        tl.store(ddt_bias + of_head + one, tl.sum(dsize[None, :], 1))
