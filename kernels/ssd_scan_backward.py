"""Gradients of Mamba-2's scan, in chunks of Q steps (ssd_tiles.py): the states before all chunks again, and backwards
their gradients after all chunks. Then one kernel has a chunk of one head in a program, for all but the gradients of B
and C, of which another sums those of a group's heads. Sums over steps and heads are left in float32, in order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import ssd_pairs
from .activation import activate_grad
from .reduction import sum_partials
from .runtime import device_of, on_device
from .scan_steps import strides_of
from .ssd_tiles import (
    CHUNK,
    DECAY,
    DT,
    PLANES,
    REST,
    Passes,
    Tiles,
    chunk_of,
    decay_within,
    dot,
    load_gated,
    load_plane,
    load_tile,
    narrow,
    skip_strides,
    store_tile,
)

TILES = {
    "tf32x3": (Tiles(16, 32, 8, 2), Tiles(64, 32, 8, 1)),
    "tf32": (Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 1)),
    "ieee": (Tiles(32, 16, 8, 1), Tiles(32, 16, 8, 1)),
}
COEFFICIENT_TILES = {
    "tf32x3": (Tiles(32, 32, 8, 2), Tiles(64, 64, 8, 2)),
    "tf32": (Tiles(16, 32, 8, 2), Tiles(32, 64, 8, 1)),
    "ieee": (Tiles(32, 16, 8, 2), Tiles(32, 16, 8, 2)),
}
PROGRAMS_PER_SM = 2  # that the heads of a group are divided among for


@triton.jit(do_not_specialize=["steps"])
def ssd_scan_backward_kernel(
    dy,  # (B, L, H, P)
    x,  # (B, L, H, P)
    B,  # (B, L, G, N)
    C,  # (B, L, G, N)
    D,  # (H, P) float32 or None
    z,  # (B, L, H, P) or None
    cu_seqlens,  # (sequences + 1,) or None: every batch element is a sequence
    per_step,  # (slots, H, PLANES, Q) float32
    states,  # (slots, H, P, N) float32: before each chunk; None if dz is
    dstates,  # (slots, H, P, N) float32: gradients of those after each chunk; None if dx is
    dx,  # (B, L, H, P), as all that follow None where it is not asked for
    dD,  # (slots, H, P) float32 sums over a chunk
    dz,  # (B, L, H, P)
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
    PRECISION: tl.constexpr,  # of the products
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    slot, head = tl.program_id(0) // heads, (tl.program_id(0) % heads).to(tl.int64)
    batch, begin, end = chunk_of(slot, cu_seqlens, steps, sequences)
    if end <= begin:
        return
    dtype: tl.constexpr = x.dtype.element_ty
    in_chunk = tl.arange(0, CHUNK)
    t = (begin + in_chunk).to(tl.int64)
    inside = t < end
    of_head = slot.to(tl.int64) * heads + head
    of_steps = (batch * steps * heads + head) * headdim  # in dx and dz
    per_step += of_head * PLANES * CHUNK
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

    for first_p in range(0, headdim, BLOCK_P):
        p = (first_p + tl.arange(0, BLOCK_P)).to(tl.int64)
        mask_p = p < headdim
        read = tl.zeros((CHUNK, BLOCK_P), tl.float32)  # S C[t]
        dwritten = tl.zeros((CHUNK, BLOCK_P), tl.float32)  # dS B[t]
        for first_n in range(0, dstate, BLOCK_N):
            n = (first_n + tl.arange(0, BLOCK_N)).to(tl.int64)
            mask_n = n < dstate
            if states is not None:
                c = load_tile(C, t, n, stride_Ct, stride_Cn, inside, mask_n)
                state = load_tile(states + of_head * headdim * dstate, p, n, dstate, 1, mask_p, mask_n)
                read = dot(c, tl.trans(narrow(state, dtype)), read, PRECISION)
            if dstates is not None:
                b = load_tile(B, t, n, stride_Bt, stride_Bn, inside, mask_n)
                dstate_after = load_tile(dstates + of_head * headdim * dstate, p, n, dstate, 1, mask_p, mask_n)
                dwritten = dot(b, tl.trans(narrow(dstate_after, dtype)), dwritten, PRECISION)
        read *= load_plane(per_step, DECAY, in_chunk)[:, None]
        dwritten *= load_plane(per_step, REST, in_chunk)[:, None]

        values = load_tile(x, t, p, stride_xt, stride_xp, inside, mask_p)
        dout = load_gated(dy, z, t, p, stride_dyt, stride_dyp, stride_zt, stride_zp, inside, mask_p)
        skip = tl.zeros((BLOCK_P,), tl.float32)
        if D is not None:
            skip += tl.load(D + head * stride_Dh + p * stride_Dp, mask=mask_p, other=0.0)
        if dD is not None:
            sums = tl.sum(dout.to(tl.float32) * values.to(tl.float32), 0)
            tl.store(dD + of_head * headdim + p, sums, mask=mask_p)
        if dz is not None:
            read = dot(narrow(matrix * size[None, :], dtype), values, read, PRECISION) + skip[None, :] * values
            gate = load_tile(z, t, p, stride_zt, stride_zp, inside, mask_p).to(tl.float32)
            dgated = load_tile(dy, t, p, stride_dyt, stride_dyp, inside, mask_p).to(tl.float32)
            read *= activate_grad(dgated, gate, 0.0, 0.0, "silu")
            store_tile(dz + of_steps, read, t, p, heads * headdim, 1, inside, mask_p)
        if dx is not None:
            dwritten = dot(tl.trans(narrow(matrix, dtype)), narrow(dout, dtype), dwritten, PRECISION)
            dvalues = size[:, None] * dwritten + skip[None, :] * dout
            store_tile(dx + of_steps, dvalues, t, p, heads * headdim, 1, inside, mask_p)


@triton.jit(do_not_specialize=["steps", "turns"])
def ssd_coefficients_backward_kernel(
    dy,  # (B, L, H, P)
    x,  # (B, L, H, P)
    B,  # (B, L, G, N)
    C,  # (B, L, G, N)
    z,  # (B, L, H, P) or None
    cu_seqlens,  # (sequences + 1,) or None: every batch element is a sequence
    per_step,  # (slots, H, PLANES, Q) float32
    states,  # (slots, H, P, N) float32: before each chunk; None if dC is
    dstates,  # (slots, H, P, N) float32: gradients of those after each chunk; None if dB is
    dB,  # (parts, B, L, G, N), or None: not asked for
    dC,  # the same
    heads,  # H
    of_group,  # heads of a group
    headdim,  # P
    dstate,  # N
    steps,  # L
    sequences,
    turns,  # heads of a program, one after the other
    stride_part,  # from one part of dB or dC to the next
    stride_dyb,
    stride_dyt,
    stride_dyh,
    stride_dyp,
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
    stride_zb,
    stride_zt,
    stride_zh,
    stride_zp,
    PRECISION: tl.constexpr,  # of the products
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    groups = heads // of_group
    slot, group = tl.program_id(0) // groups, (tl.program_id(0) % groups).to(tl.int64)
    batch, begin, end = chunk_of(slot, cu_seqlens, steps, sequences)
    if end <= begin:
        return
    dtype: tl.constexpr = x.dtype.element_ty
    n = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    mask_n = n < dstate
    in_chunk = tl.arange(0, CHUNK)
    t = (begin + in_chunk).to(tl.int64)
    inside = t < end
    dproducts = tl.zeros((CHUNK, CHUNK), tl.float32)  # of C[t] . B[s]
    reader = tl.zeros((CHUNK, BLOCK_N), tl.float32)
    writer = tl.zeros((CHUNK, BLOCK_N), tl.float32)
    first = tl.program_id(2) * turns
    for turn in range(first, tl.minimum(first + turns, of_group)):
        head = group * of_group + turn
        of_head = slot.to(tl.int64) * heads + head
        of_step = per_step + of_head * PLANES * CHUNK
        size = load_plane(of_step, DT, in_chunk)
        gates = z
        if z is not None:
            gates += batch * stride_zb + head * stride_zh
        dmatrix = tl.zeros((CHUNK, CHUNK), tl.float32)  # dy[t] . x[s]
        for first_p in range(0, headdim, BLOCK_P):
            p = (first_p + tl.arange(0, BLOCK_P)).to(tl.int64)
            mask_p = p < headdim
            dout = dy + batch * stride_dyb + head * stride_dyh
            dout = load_gated(dout, gates, t, p, stride_dyt, stride_dyp, stride_zt, stride_zp, inside, mask_p)
            values = load_tile(x + batch * stride_xb + head * stride_xh, t, p, stride_xt, stride_xp, inside, mask_p)
            dout = narrow(dout, dtype)
            dmatrix = dot(dout, tl.trans(values), dmatrix, PRECISION)
            nothing = tl.zeros((CHUNK, BLOCK_N), tl.float32)
            if dC is not None:
                state = load_tile(states + of_head * headdim * dstate, p, n, dstate, 1, mask_p, mask_n)
                reads = dot(dout, narrow(state, dtype), nothing, PRECISION)
                reader += reads * load_plane(of_step, DECAY, in_chunk)[:, None]
            if dB is not None:
                dstate_after = load_tile(dstates + of_head * headdim * dstate, p, n, dstate, 1, mask_p, mask_n)
                writes = dot(values, narrow(dstate_after, dtype), nothing, PRECISION)
                writer += writes * (load_plane(of_step, REST, in_chunk) * size)[:, None]
        dproducts += decay_within(dmatrix, of_step) * size[None, :]

    dproducts = narrow(dproducts, dtype)
    offs = (batch * steps * groups + group) * dstate + tl.program_id(2).to(tl.int64) * stride_part
    if dC is not None:
        b = load_tile(B + batch * stride_Bb + group * stride_Bg, t, n, stride_Bt, stride_Bn, inside, mask_n)
        reader = dot(dproducts, b, reader, PRECISION)
        store_tile(dC + offs, reader, t, n, groups * dstate, 1, inside, mask_n)
    if dB is not None:
        c = load_tile(C + batch * stride_Cb + group * stride_Cg, t, n, stride_Ct, stride_Cn, inside, mask_n)
        writer = dot(tl.trans(dproducts), c, writer, PRECISION)
        store_tile(dB + offs, writer, t, n, groups * dstate, 1, inside, mask_n)


@on_device
def ssd_scan_backward(
    dy: Tensor,
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
    dfinal_states: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    """(dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial_states) of those asked for, all contiguous."""
    passes = Passes(x, dt, A, B, dt_bias, cu_seqlens, dt_softplus, dt_min, dt_max)
    slots, heads, headdim, dstate = passes.slots, passes.heads, passes.headdim, passes.dstate
    pairs = output_mask[1] or output_mask[2] or output_mask[7]
    gated = output_mask[6] and z is not None

    def sums(*shape: int) -> Tensor:
        """A row is for a chunk: of packed sequences some are for none."""
        new = torch.empty if cu_seqlens is None else torch.zeros
        return new(slots, heads, *shape, dtype=torch.float32, device=x.device)

    def like(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=x.device)

    made = (
        lambda: like(x),
        lambda: like(dt),
        sums,
        lambda: like(B),
        lambda: like(C),
        lambda: sums(headdim),
        lambda: torch.zeros(x.shape, dtype=x.dtype, device=x.device) if z is None else like(z),
        sums,
        lambda: passes.float32(passes.sequences, heads, headdim, dstate),
    )
    found = [make() if asked else None for make, asked in zip(made, output_mask, strict=True)]
    dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial = found
    states = dstates = None
    if pairs or gated or dC is not None:
        states = passes.states(x, None, B, initial_states, None, False)
    if pairs or any(t is not None for t in (dx, dB, dinitial)):
        dstates = passes.states(dy, z, C, dfinal_states, dinitial, True)
    sizes = heads, passes.of_group, headdim, dstate, passes.steps, passes.sequences
    if pairs:
        tiles = passes.tiles(ssd_pairs.TILES)
        ssd_pairs.ssd_pairs_kernel[(slots * heads,)](
            dy, x, A, B, C, z, passes.cu_seqlens, passes.per_step, states, dstates, ddt, dA, ddt_bias, *sizes,
            *dy.stride(), *x.stride(), A.stride(0), *B.stride(), *C.stride(), *strides_of(z, 4),
            passes.precision, tiles.block_p, tiles.block_n, **tiles.options(),
        )  # fmt: skip
    if gated or dx is not None or dD is not None:
        tiles = passes.tiles(TILES)
        ssd_scan_backward_kernel[(slots * heads,)](
            dy, x, B, C, D, z, passes.cu_seqlens, passes.per_step,
            states if gated else None, None if dx is None else dstates, dx, dD, dz if gated else None, *sizes,
            *dy.stride(), *x.stride(), *B.stride(), *C.stride(), *skip_strides(D), *strides_of(z, 4),
            passes.cheaper, tiles.block_p, tiles.block_n, **tiles.options(),
        )  # fmt: skip
    if dB is not None or dC is not None:
        # Factors of float16's products, which have not its range, are float32.
        tiles = passes.tiles(COEFFICIENT_TILES, "tf32" if x.dtype == torch.float16 else None)
        blocks = triton.cdiv(dstate, tiles.block_n)
        wanted = triton.cdiv(PROGRAMS_PER_SM * device_of(x).num_sms, max(1, slots * passes.groups * blocks))
        turns = triton.cdiv(passes.of_group, wanted)
        parts = triton.cdiv(passes.of_group, max(1, turns))
        partial = [t if t is None or parts == 1 else passes.float32(parts, *t.shape) for t in (dB, dC)]
        ssd_coefficients_backward_kernel[(slots * passes.groups, blocks, parts)](
            dy, x, B, C, z, passes.cu_seqlens, passes.per_step,
            None if dC is None else states, None if dB is None else dstates, *partial, *sizes, turns, B.numel(),
            *dy.stride(), *x.stride(), *B.stride(), *C.stride(), *strides_of(z, 4),
            passes.cheaper, tiles.block_p, tiles.block_n, **tiles.options(),
        )  # fmt: skip
        for i, of_parts in zip((3, 4), partial, strict=True):
            if of_parts is not None and parts != 1:
                found[i] = sum_partials(of_parts.view(1, parts, -1), 1, B.dtype)[0].view(B.shape)
    for i in (2, 5, 7):
        of_chunks = found[i]
        if of_chunks is not None:
            total = sum_partials(of_chunks.flatten(1)[None], 1, torch.float32)[0].view(of_chunks.shape[1:])
            found[i] = total.sum(1) if i == 5 and (D is None or D.dim() == 1) else total
    return tuple(torch.empty(0, dtype=x.dtype, device=x.device) if t is None else t for t in found)


def sweep(dtype: torch.dtype, full: bool) -> None:
    """Launches the kernels for offline compilation: in the costliest form, or with `full` in others."""
    before = torch.get_float32_matmul_precision()
    for precision in ("highest", "high") if dtype == torch.float32 else (before,):
        torch.set_float32_matmul_precision(precision)
        x, B = torch.empty(2, 256, 16, 64, dtype=dtype), torch.empty(2, 256, 2, 128, dtype=dtype)
        A, D, h = torch.empty(16), torch.empty(16, 64), torch.empty(2, 16, 64, 128)
        ssd_scan_backward(x, x, x[..., 0], A, B, B, D, x, A, h, None, h, True, 0.0, 1.0, [True] * 9)
        if full:
            one, b, bounds = x[:1], B[:1], torch.empty(3, dtype=torch.int32)
            ssd_scan_backward(
                one, one, one[..., 0], A, b, b, None, None, None, None, bounds, None, False, 0.0, 1.0,
                [True] * 5 + [False] * 4,
            )  # fmt: skip
    torch.set_float32_matmul_precision(before)
