"""Gradients of the selective scan: chunk by chunk from the last, a recurrence that runs backwards in time.

A program has one sequence and some blocks of channels of one group, one after the other. Of each chunk it finds the
states before its tiles, from the checkpoint; then, tile by tile from the last, the states within by one scan and their
gradients by another, reversed. Sums over channels, of B and C, and over steps, of parameters, are left in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import LOG2E, activate, activate_grad, sigmoid
from .reduction import sum_partials
from .runtime import FP_FUSION, empty_in_layout_of, on_device
from .scan_steps import (
    BACKWARD_T,
    BLOCK_D,
    BLOCK_N,
    NUM_WARPS,
    advance,
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
    with_step,
)


@triton.jit
def accumulate(x, offs, value, mask, again):
    """Adds value to x, or if not again is the first to store there."""
    if again:
        value += tl.load(x + offs, mask=mask, other=0.0)
    tl.store(x + offs, value, mask=mask)


@triton.jit(do_not_specialize=["steps", "turns"])
def scan_backward_kernel(
    dy,  # (B, D, L)
    u,  # (B, D, L)
    delta,  # (B, D, L)
    A,  # (D, N) float32
    B,  # (B, groups, N, L), or (D, N) float32
    C,  # the same
    D,  # (D,) float32 or None
    z,  # (B, D, L) or None
    delta_bias,  # (D,) float32 or None
    initial,  # (sequences, D, N) float32 or None: zeros
    cu_seqlens,  # (sequences + 1,) or None: every batch element is a sequence
    checkpoints,  # (B, chunks, D, N) float32: the states before every chunk
    workspace,  # (programs, tiles of a chunk, BLOCK_D, N) float32: the states before each tile
    dstates,  # (sequences, D, N) float32: gradients of the last states, which become those of the initial ones
    du,  # (B, D, L), as all that follow None where it is not asked for
    ddelta,  # (B, D, L)
    dA,  # (rows, D, N) float32 sums over steps; a row for each chunk of each sequence
    dB,  # (parts, B, groups, L, N) float32 sums over a program's channels, or (rows, D, N)
    dC,  # the same
    dD,  # (rows, D) float32
    dz,  # (B, D, L)
    ddelta_bias,  # (rows, D) float32
    dim,  # D
    steps,  # L
    states,  # N
    groups,  # of channels, each with its B and C
    chunk,  # steps from one checkpoint to the next
    turns,  # blocks of channels that each program takes
    parts,  # programs that share a group's channels
    stride_part,  # from one part of dB or dC to the next
    stride_dyb,
    stride_dyd,
    stride_dyt,
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
    stride_dub,
    stride_dud,
    stride_dut,
    stride_ddeltab,
    stride_ddeltad,
    stride_ddeltat,
    stride_dzb,
    stride_dzd,
    stride_dzt,
    VARIES_B: tl.constexpr,  # whether B varies over steps
    VARIES_C: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    BLOCK_T: tl.constexpr,  # steps of a tile
    BLOCK_D: tl.constexpr,  # channels of a block
    BLOCK_N: tl.constexpr,  # states at a time
):
    of_group = dim // groups
    part = (tl.program_id(0) % parts).to(tl.int64)
    group = (tl.program_id(0) // parts % groups).to(tl.int64)
    sequence = (tl.program_id(0) // (parts * groups)).to(tl.int64)
    batch, begin, end = bounds_of(cu_seqlens, sequence, steps)
    chunks = tl.cdiv(steps, chunk)
    first_chunk = begin // chunk
    last_chunk = tl.cdiv(end, chunk) - 1
    in_block = tl.arange(0, BLOCK_D)
    dy += batch * stride_dyb
    u += batch * stride_ub
    delta += batch * stride_deltab
    B += batch * stride_Bb + group * stride_Bg
    C += batch * stride_Cb + group * stride_Cg
    dstates += sequence * dim * states
    offs_part = part * stride_part + (batch * groups + group) * steps * states
    workspace += tl.program_id(0).to(tl.int64) * (chunk // BLOCK_T) * BLOCK_D * states

    for turn in range(turns):
        d = (part * turns + turn) * BLOCK_D + in_block
        mask_d = d < of_group
        d += group * of_group
        skip = tl.zeros((1, BLOCK_D), tl.float32)
        if D is not None:
            skip += tl.load(D + d, mask=mask_d, other=0.0)[None, :]
        for back in range(last_chunk + 1 - first_chunk):
            index = last_chunk - back
            first = tl.maximum(index * chunk, begin // BLOCK_T * BLOCK_T)
            tiles = tl.cdiv(tl.minimum(index * chunk + chunk, end) - first, BLOCK_T)
            row = (index + (sequence if cu_seqlens is not None else sequence * chunks)) * dim
            tl.debug_barrier()  # the workspace is no longer read

            # The states before each tile.
            for first_n in range(0, states, BLOCK_N):
                n = first_n + tl.arange(0, BLOCK_N)
                mask_n = n < states
                mask_state = mask_d[:, None] & mask_n[None, :]
                offs_state = d[:, None] * states + n[None, :]
                offs_work = in_block[:, None] * states + n[None, :]
                rate = tl.load(A + offs_state, mask=mask_state, other=0.0) * LOG2E
                h = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
                if index * chunk > begin:
                    saved = checkpoints + (batch * chunks + index) * dim * states
                    h += tl.load(saved + offs_state, mask=mask_state, other=0.0)
                elif initial is not None:
                    h += tl.load(initial + sequence * dim * states + offs_state, mask=mask_state, other=0.0)
                tl.store(workspace + offs_work, h, mask=mask_n[None, :])
                for i in range(1, tiles):
                    t = first + (i - 1) * BLOCK_T + tl.arange(0, BLOCK_T)
                    inside = t >= begin
                    mask = inside[:, None] & mask_d[None, :]
                    step = load_sizes(delta, delta_bias, t, d, stride_deltat, stride_deltad, mask, mask_d, SOFTPLUS)[0]
                    x = load_steps(u, t, d, stride_ut, stride_ud, mask)
                    b = load_coefficient(B, t, d, n, stride_Bt, stride_Bn, inside, mask_d, mask_n, states, VARIES_B)
                    after = states_after(h, decays(step, rate, inside), (step * x)[:, :, None] * b)
                    h = at_step(after, BLOCK_T - 1)
                    tl.store(workspace + i * BLOCK_D * states + offs_work, h, mask=mask_n[None, :])

            dD_sum = tl.zeros((BLOCK_D,), tl.float32)
            dbias_sum = tl.zeros((BLOCK_D,), tl.float32)
            for back_tile in range(tiles):
                i = tiles - 1 - back_tile
                t = first + i * BLOCK_T + tl.arange(0, BLOCK_T)
                inside = (t >= begin) & (t < end)
                earlier = (t > begin) & (t <= end)  # of t - 1
                later = (t + 1 >= begin) & (t + 1 < end)
                mask = inside[:, None] & mask_d[None, :]
                step, raw = load_sizes(delta, delta_bias, t, d, stride_deltat, stride_deltad, mask, mask_d, SOFTPLUS)
                x = load_steps(u, t, d, stride_ut, stride_ud, mask)
                near = earlier[:, None] & mask_d[None, :]
                size = load_sizes(delta, delta_bias, t - 1, d, stride_deltat, stride_deltad, near, mask_d, SOFTPLUS)[0]
                added = size * load_steps(u, t - 1, d, stride_ut, stride_ud, near)
                near = later[:, None] & mask_d[None, :]
                size = load_sizes(delta, delta_bias, t + 1, d, stride_deltat, stride_deltad, near, mask_d, SOFTPLUS)[0]
                dout = load_steps(dy, t, d, stride_dyt, stride_dyd, mask)
                if z is not None:
                    gate = load_steps(z + batch * stride_zb, t, d, stride_zt, stride_zd, mask)
                    dgate = activate_grad(dout, gate, 0.0, 0.0, "silu")
                    dout *= activate(gate, 0.0, 0.0, "silu")
                out = skip * x
                dx = skip * dout
                dinput = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)  # of step x
                dstep = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
                tl.debug_barrier()  # what was left for this tile, and in the turn before, is there
                for first_n in range(0, states, BLOCK_N):
                    n = first_n + tl.arange(0, BLOCK_N)
                    mask_n = n < states
                    mask_state = mask_d[:, None] & mask_n[None, :]
                    offs_state = d[:, None] * states + n[None, :]
                    offs_work = in_block[:, None] * states + n[None, :]
                    a = tl.load(A + offs_state, mask=mask_state, other=0.0)
                    rate = a * LOG2E
                    decay = decays(step, rate, inside)

                    # What a step's decay leaves of the state before it, to which the step before adds its input first.
                    b = load_coefficient(
                        B, t - 1, d, n, stride_Bt, stride_Bn, earlier, mask_d, mask_n, states, VARIES_B
                    )
                    h = tl.load(workspace + i * BLOCK_D * states + offs_work, mask=mask_n[None, :], other=0.0)
                    left = decay * with_step(added[:, :, None] * b, 0, h)
                    _, left = tl.associative_scan((decay, left), 0, advance)

                    # The gradient of the state after a step: what the step after it passes on, and the step's own.
                    c = load_coefficient(C, t, d, n, stride_Ct, stride_Cn, inside, mask_d, mask_n, states, VARIES_C)
                    own = dout[:, :, None] * c
                    carry = tl.load(dstates + offs_state, mask=mask_state, other=0.0)
                    own += with_step(tl.zeros_like(own), BLOCK_T - 1, carry)
                    _, dh = tl.associative_scan((decays(size, rate, later), own), 0, advance, reverse=True)
                    tl.store(dstates + offs_state, at_step(decay * dh, 0), mask=mask_state)
                    dh = tl.where(inside[:, None, None], dh, 0.0)

                    b = load_coefficient(B, t, d, n, stride_Bt, stride_Bn, inside, mask_d, mask_n, states, VARIES_B)
                    after = left + (step * x)[:, :, None] * b
                    out += tl.sum(after * c, 2)
                    dinput += tl.sum(dh * b, 2)
                    ddecay = dh * left
                    dstep += tl.sum(ddecay * a[None, :, :], 2)
                    of_step = offs_part + t.to(tl.int64)[:, None] * states + n[None, :]
                    mask_step = inside[:, None] & mask_n[None, :]
                    of_row = row * states + offs_state
                    if dA is not None:
                        accumulate(dA, of_row, tl.sum(ddecay * step[:, :, None], 0), mask_state, back_tile > 0)
                    if dB is not None:
                        terms = dh * (step * x)[:, :, None]
                        if VARIES_B:
                            accumulate(dB, of_step, tl.sum(terms, 1), mask_step, turn > 0)
                        else:
                            accumulate(dB, of_row, tl.sum(terms, 0), mask_state, back_tile > 0)
                    if dC is not None:
                        terms = after * dout[:, :, None]
                        if VARIES_C:
                            accumulate(dC, of_step, tl.sum(terms, 1), mask_step, turn > 0)
                        else:
                            accumulate(dC, of_row, tl.sum(terms, 0), mask_state, back_tile > 0)
                dx += dinput * step
                dstep += dinput * x
                if SOFTPLUS:
                    dstep *= sigmoid(raw)
                dD_sum += tl.sum(dout * x, 0)
                dbias_sum += tl.sum(tl.where(mask, dstep, 0.0), 0)
                if du is not None:
                    store_steps(du + batch * stride_dub, dx, t, d, stride_dut, stride_dud, mask)
                if ddelta is not None:
                    store_steps(ddelta + batch * stride_ddeltab, dstep, t, d, stride_ddeltat, stride_ddeltad, mask)
                if z is not None and dz is not None:
                    store_steps(dz + batch * stride_dzb, dgate * out, t, d, stride_dzt, stride_dzd, mask)
            if dD is not None:
                tl.store(dD + row + d, dD_sum, mask=mask_d)
            if ddelta_bias is not None:
                tl.store(ddelta_bias + row + d, dbias_sum, mask=mask_d)


@on_device
def selective_scan_backward(
    dy: Tensor,
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
    dlast_state: Tensor | None,
    checkpoints: Tensor,
    delta_softplus: bool,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    """(du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state) of those asked for."""
    batch, dim, steps = u.shape
    states = A.shape[1]
    groups, chunk = groups_of(B, C), chunk_length(states)
    dstates = states_from(dlast_state, A, batch, cu_seqlens)
    sequences = dstates.shape[0]
    rows = triton.cdiv(steps, chunk) * batch + (0 if cu_seqlens is None else sequences)
    varies = B.dim() == 4, C.dim() == 4
    # The parts of dB and dC take no more memory than u, or twice the gradient where that is more.
    blocks = triton.cdiv(dim // groups, BLOCK_D)
    most = max(2, dim // max(1, groups * states)) if any(varies) else blocks
    turns = max(1, triton.cdiv(blocks, most))
    parts = triton.cdiv(blocks, turns)
    programs = sequences * groups * parts

    def float32(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=u.device)

    def sums(*shape: int) -> Tensor:
        """A row is for a chunk of a sequence: of packed ones some are for none."""
        new = torch.empty if cu_seqlens is None else torch.zeros
        return new(rows, *shape, dtype=torch.float32, device=u.device)

    def part(x: Tensor) -> Tensor:
        return float32(parts, batch, groups, steps, states) if x.dim() == 4 else sums(dim, states)

    made = (
        lambda: empty_in_layout_of(u),
        lambda: empty_in_layout_of(delta),
        lambda: sums(dim, states),
        lambda: part(B),
        lambda: part(C),
        lambda: sums(dim),
        lambda: empty_in_layout_of(u if z is None else z),
        lambda: sums(dim),
        lambda: dstates,
    )
    found = [make() if asked else None for make, asked in zip(made, output_mask, strict=True)]
    du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, _ = found
    B, C = (x if x.dim() == 4 else x.contiguous() for x in (B, C))
    # fmt: off
    scan_backward_kernel[(programs,)](
        dy, u, delta, A.contiguous(), B, C, contiguous(D), z, contiguous(delta_bias), contiguous(initial_state),
        contiguous(cu_seqlens), checkpoints.contiguous(),
        float32(programs, chunk // BACKWARD_T, BLOCK_D, states),
        dstates, du, ddelta, dA, dB, dC, dD, dz, ddelta_bias,
        dim, steps, states, groups, chunk, turns, parts, batch * groups * steps * states,
        *dy.stride(), *u.stride(), *delta.stride(), *strides_of(B, 4), *strides_of(C, 4), *strides_of(z, 3),
        *strides_of(du, 3), *strides_of(ddelta, 3), *strides_of(dz, 3),
        *varies, delta_softplus, BACKWARD_T, BLOCK_D, BLOCK_N,
        num_warps=NUM_WARPS, enable_fp_fusion=FP_FUSION,
    )
    # fmt: on
    if dz is not None and z is None:
        dz.zero_()
    for i, like in ((2, A), (3, B), (4, C), (5, None), (7, None)):
        partial = found[i]
        if partial is None:
            continue
        dtype = torch.float32 if like is None else like.dtype
        total = sum_partials(partial.flatten(1)[None], 1, dtype)[0].view(partial.shape[1:])
        found[i] = total.mT if total.dim() == 4 else total
    return tuple(torch.empty(0, dtype=u.dtype, device=u.device) if x is None else x for x in found)


def sweep(dtype: torch.dtype, full: bool) -> None:
    """Launches the kernel for offline compilation: in the costliest form, or with `full` in others."""
    u, D = torch.empty(2, 256, 64, dtype=dtype).mT, torch.empty(64)
    A, B, h = torch.empty(64, 16), torch.empty(2, 1, 256, 16, dtype=dtype).mT, torch.empty(2, 64, 16)
    selective_scan_backward(u, u, u, A, B, B, D, u, D, h, None, h, h, True, [True] * 9)
    if full:
        one, bounds = u[:1], torch.empty(3, dtype=torch.int32)
        asked = [True] * 5 + [False] * 4
        selective_scan_backward(one, one, one, A, A, A, None, None, None, None, bounds, None, h, False, asked)
