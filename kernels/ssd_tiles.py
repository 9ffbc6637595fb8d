"""What the kernels of Mamba-2's scan share: B batch, L steps, H heads of P channels, G groups of heads, N states.

A head goes through a sequence in chunks of Q steps, as matrix products (Dao and Gu, 2024, section 6). With cum[t] the
sum of dt A from the chunk's first step to t, and the state S (P, N) before the chunk:
  y[t] = exp(cum[t]) S C[t] + sum over s <= t of (C[t] . B[s]) exp(cum[t] - cum[s]) dt[s] x[s]
  S    = exp(cum[Q - 1]) S + sum over s of exp(cum[Q - 1] - cum[s]) dt[s] x[s] B[s]^T
A chunk has a slot for what is kept of it; of packed sequences some slots have no chunk.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import activate, exp, sigmoid
from .runtime import ALL_REGISTERS, FP_FUSION, INTERPRETED, device_of, rounded
from .scan_steps import contiguous, softplus, strides_of

NONE = tl.constexpr(-128.0)  # what decays by more is zero in float32; its sum with others stays exact
CHUNK = tl.constexpr(64)  # Q
BLOCK_T = tl.constexpr(64 if INTERPRETED else 32)  # steps that what a chunk adds to the state is summed over at a time
# What is kept of each step, in planes of Q: cum in two parts, exp(cum[t]), exp(cum[Q - 1] - cum[t]), dt and its slope.
HIGH, LOW, DECAY, REST, DT, SLOPE = (tl.constexpr(i) for i in range(6))
PLANES = tl.constexpr(6)
# Heads of a program of the first pass; elements of a state that one of the third has.
BLOCK_H, BLOCK_STATE = (64, 8192) if INTERPRETED else (4, 1024)
NUM_WARPS = 4


class Tiles(NamedTuple):
    block_p: int  # channels of a tile
    block_n: int  # states of a tile
    num_warps: int
    num_stages: int  # steps in flight of loops over channels or states

    def options(self) -> dict[str, Any]:
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "maxnreg": ALL_REGISTERS,
            "enable_fp_fusion": FP_FUSION,
        }


# By the precision of products: for chips that multiply by mma.sync, of which each thread has its share of the operands
# in registers, and for those that have wgmma or tcgen05.
Table = dict[str, tuple[Tiles, Tiles]]
INTERPRETED_TILES = Tiles(32, 64, 8, 1)  # the interpreter takes hardly longer for larger ones
STATE_TILES: Table = {  # of the kernel that multiplies x and B
    "tf32x3": (Tiles(64, 64, 8, 2), Tiles(64, 64, 8, 2)),
    "tf32": (Tiles(64, 64, 8, 1), Tiles(64, 64, 8, 1)),
    "ieee": (Tiles(32, 32, 8, 2), Tiles(32, 32, 8, 2)),
}


def precision_of(dtype: torch.dtype) -> str:
    """Of the products that lead to float32: of float32 inputs as torch's setting says."""
    if dtype != torch.float32:
        return "tf32x3"
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


# ---- chunks --------------------------------------------------------------------------------------------------------


def slots_of(batch: int, steps: int, sequences: int, cu_seqlens: Tensor | None) -> int:
    """How many slots there are. The chunks of packed sequence i begin at slot cu_seqlens[i] // Q + i."""
    return batch * triton.cdiv(steps, CHUNK.value) if cu_seqlens is None else steps // CHUNK.value + sequences


@triton.jit
def sequence_of(sequence, cu_seqlens, steps):
    """The sequence's first slot, and how many chunks it has."""
    if cu_seqlens is None:
        chunks = tl.cdiv(steps, CHUNK)
        return sequence * chunks, chunks
    else:
        begin = tl.maximum(tl.load(cu_seqlens + sequence), 0)
        end = tl.minimum(tl.load(cu_seqlens + sequence + 1), steps)
        return begin // CHUNK + sequence, tl.cdiv(tl.maximum(end - begin, 0), CHUNK)


@triton.jit
def chunk_of(slot, cu_seqlens, steps, sequences):
    """The chunk's batch element, its first step, and the one after its last; no steps if the slot has no chunk."""
    if cu_seqlens is None:
        chunks = tl.cdiv(steps, CHUNK)
        begin = slot % chunks * CHUNK
        return (slot // chunks).to(tl.int64), begin, tl.minimum(begin + CHUNK, steps)
    else:
        low = slot * 0  # the last sequence that begins at this slot or before is from low on, and before high
        high = low + sequences
        while high - low > 1:
            middle = (low + high) // 2
            before = tl.load(cu_seqlens + middle) // CHUNK + middle <= slot
            low = tl.where(before, middle, low)
            high = tl.where(before, high, middle)
        first = tl.maximum(tl.load(cu_seqlens + low), 0)
        begin = first + (slot - first // CHUNK - low) * CHUNK
        end = tl.minimum(tl.load(cu_seqlens + low + 1), steps)
        return (slot * 0).to(tl.int64), begin, tl.minimum(begin + CHUNK, end)


# ---- tiles ---------------------------------------------------------------------------------------------------------


@triton.jit
def load_tile(x, rows, cols, stride_row, stride_col, mask_row, mask_col):
    """(rows, cols), which are int64, in x's dtype; zero where masked off."""
    offs = rows[:, None] * stride_row + cols[None, :] * stride_col
    return tl.load(x + offs, mask=mask_row[:, None] & mask_col[None, :], other=0.0)


@triton.jit
def store_tile(x, value, rows, cols, stride_row, stride_col, mask_row, mask_col):
    """Rounds value once."""
    offs = rows[:, None] * stride_row + cols[None, :] * stride_col
    tl.store(x + offs, rounded(value, x.dtype.element_ty), mask=mask_row[:, None] & mask_col[None, :])


@triton.jit
def load_gated(x, z, rows, cols, stride_row, stride_col, stride_zrow, stride_zcol, mask_row, mask_col):
    """x times silu(z) in float32, or x as it is without z."""
    value = load_tile(x, rows, cols, stride_row, stride_col, mask_row, mask_col)
    if z is None:
        return value
    else:
        gate = load_tile(z, rows, cols, stride_zrow, stride_zcol, mask_row, mask_col).to(tl.float32)
        return value.to(tl.float32) * activate(gate, 0.0, 0.0, "silu")


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b, of this precision unless both are of one 16-bit dtype, whose products are exact."""
    if INTERPRETED or a.dtype != b.dtype:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=PRECISION)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """x as a factor of what will be rounded to dtype: bfloat16 for that; float16 has not the range."""
    if dtype == tl.bfloat16:
        return rounded(x.to(tl.float32), dtype)
    else:
        return x


@triton.jit
def load_plane(per_step, plane: tl.constexpr, t):
    """Of the steps t of the chunk."""
    return tl.load(per_step + plane * CHUNK + t)


@triton.jit
def decay_between(high, low, from_high, from_low):
    """exp of the difference of two sums in two parts each. The difference is exact too: one rounding of it would be
    several of its exponential."""
    difference = high - from_high
    back = high - difference
    lost = (high - (difference + (high - difference))) + (back - from_high)
    decay = exp(difference)
    return decay * (lost + (low - from_low)) + decay


@triton.jit
def decay_within(products, per_step):
    """(Q, Q): products[t][s] exp(cum[t] - cum[s]) where s <= t, else zero."""
    t = tl.arange(0, CHUNK)
    high, low = load_plane(per_step, HIGH, t), load_plane(per_step, LOW, t)
    decay = decay_between(high[:, None], low[:, None], high[None, :], low[None, :])
    return tl.where(t[:, None] >= t[None, :], products * decay, 0.0)


# ---- kernels -------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["steps", "dt_min", "dt_max"])
def ssd_steps_kernel(
    dt,  # (B, L, H)
    A,  # (H,) float32
    dt_bias,  # (H,) float32 or None
    cu_seqlens,  # (sequences + 1,) or None: every batch element is a sequence
    per_step,  # (slots, H, PLANES, Q) float32
    heads,  # H
    steps,  # L
    sequences,
    dt_min,
    dt_max,
    stride_dtb,
    stride_dtt,
    stride_dth,
    stride_A,
    stride_bias,
    SOFTPLUS: tl.constexpr,
    BLOCK_H: tl.constexpr,  # heads of a program
):
    slot = tl.program_id(0)
    batch, begin, end = chunk_of(slot, cu_seqlens, steps, sequences)
    if end <= begin:
        return
    h = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
    t = tl.arange(0, CHUNK).to(tl.int64)
    mask_h, inside = h < heads, begin + t < end
    mask = mask_h[:, None] & inside[None, :]
    raw = load_tile(dt + batch * stride_dtb, h, begin + t, stride_dth, stride_dtt, mask_h, inside).to(tl.float32)
    if dt_bias is not None:
        raw += tl.load(dt_bias + h * stride_bias, mask=mask_h, other=0.0)[:, None]
    size = softplus(raw) if SOFTPLUS else raw
    slope = sigmoid(raw) if SOFTPLUS else tl.full(raw.shape, 1.0, tl.float32)
    slope = tl.where((size < dt_min) | (size > dt_max), 0.0, slope)
    size = tl.where(size < dt_min, dt_min, size)  # this way round a NaN stays
    size = tl.where(size > dt_max, dt_max, size)
    size = tl.where(mask, size, 0.0)
    rate = tl.load(A + h * stride_A, mask=mask_h, other=0.0).to(tl.float64)[:, None]
    exponent = tl.where(mask, size.to(tl.float64) * rate, 0.0)
    cum = tl.cumsum(tl.where(exponent < NONE, NONE, exponent), 1)
    high = cum.to(tl.float32)
    low = (cum - high.to(tl.float64)).to(tl.float32)
    decay = exp(high)
    left = tl.sum(tl.where(t[None, :] == CHUNK - 1, cum, 0.0), 1)[:, None] - cum
    left_high = left.to(tl.float32)
    rest = exp(left_high)
    per_step += (slot.to(tl.int64) * heads + h)[:, None] * PLANES * CHUNK + t[None, :]
    mask_h = mask_h[:, None]
    tl.store(per_step + HIGH * CHUNK, high, mask=mask_h)
    tl.store(per_step + LOW * CHUNK, low, mask=mask_h)
    tl.store(per_step + DECAY * CHUNK, decay * low + decay, mask=mask_h)
    tl.store(per_step + REST * CHUNK, rest * (left - left_high.to(tl.float64)).to(tl.float32) + rest, mask=mask_h)
    tl.store(per_step + DT * CHUNK, size, mask=mask_h)
    tl.store(per_step + SLOPE * CHUNK, slope, mask=mask_h)


@triton.jit(do_not_specialize=["steps"])
def ssd_chunk_states_kernel(
    x,  # (B, L, H, P), or backwards dy
    z,  # (B, L, H, P) whose silu x is multiplied with, or None
    B,  # (B, L, G, N), or backwards C
    cu_seqlens,  # (sequences + 1,) or None
    per_step,  # (slots, H, PLANES, Q) float32
    states,  # (slots, H, P, N) float32: what a chunk adds to the state after it, or backwards to the gradient before
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
    stride_zb,
    stride_zt,
    stride_zh,
    stride_zp,
    stride_Bb,
    stride_Bt,
    stride_Bg,
    stride_Bn,
    BACKWARDS: tl.constexpr,
    PRECISION: tl.constexpr,  # of the products
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    slot, head = tl.program_id(0) // heads, (tl.program_id(0) % heads).to(tl.int64)
    batch, begin, end = chunk_of(slot, cu_seqlens, steps, sequences)
    if end <= begin:
        return
    blocks = tl.cdiv(dstate, BLOCK_N)
    p = tl.program_id(1) // blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.program_id(1) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    p, n = p.to(tl.int64), n.to(tl.int64)
    mask_p, mask_n = p < headdim, n < dstate
    of_head = slot.to(tl.int64) * heads + head
    per_step += of_head * PLANES * CHUNK
    x += batch * stride_xb + head * stride_xh
    B += batch * stride_Bb + head // of_group * stride_Bg
    if z is not None:
        z += batch * stride_zb + head * stride_zh
    added = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for start in range(0, CHUNK, BLOCK_T):
        in_chunk = start + tl.arange(0, BLOCK_T)
        t = (begin + in_chunk).to(tl.int64)
        inside = t < end
        values = load_gated(x, z, t, p, stride_xt, stride_xp, stride_zt, stride_zp, inside, mask_p).to(tl.float32)
        if BACKWARDS:
            weight = load_plane(per_step, DECAY, in_chunk)
        else:
            weight = load_plane(per_step, REST, in_chunk) * load_plane(per_step, DT, in_chunk)
        values *= weight[:, None]
        b = load_tile(B, t, n, stride_Bt, stride_Bn, inside, mask_n)
        added = dot(tl.trans(values), b, added, PRECISION)
    store_tile(states + of_head * headdim * dstate, added, p, n, dstate, 1, mask_p, mask_n)


@triton.jit(do_not_specialize=["steps"])
def ssd_pass_states_kernel(
    states,  # (slots, H, P N) float32: what each chunk adds, which becomes the state before it, or backwards after
    per_step,  # (slots, H, PLANES, Q) float32
    first,  # (sequences, H, P N) float32 or None: zeros
    last,  # (sequences, H, P N) float32 or None: not asked for
    cu_seqlens,  # (sequences + 1,) or None
    heads,  # H
    size,  # P N
    steps,  # L
    BACKWARDS: tl.constexpr,
    BLOCK: tl.constexpr,  # elements of a program
):
    sequence, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    begin, chunks = sequence_of(sequence, cu_seqlens, steps)
    begin = begin.to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    of_sequence = (sequence.to(tl.int64) * heads + head) * size
    state = tl.zeros((BLOCK,), tl.float32)
    if first is not None:
        state += tl.load(first + of_sequence + i, mask=mask, other=0.0)
    step = -1 if BACKWARDS else 1
    row = (begin + (chunks - 1 if BACKWARDS else 0)) * heads + head
    added = tl.load(states + row * size + i, mask=i < tl.where(chunks > 0, size, 0), other=0.0)
    for chunk in range(chunks):
        following = row + step * heads
        then = tl.load(states + following * size + i, mask=i < tl.where(chunk + 1 < chunks, size, 0), other=0.0)
        tl.store(states + row * size + i, state, mask=mask)
        state = load_plane(per_step + row * PLANES * CHUNK, DECAY, CHUNK - 1) * state + added
        row, added = following, then
    if last is not None:
        tl.store(last + of_sequence + i, state, mask=mask)


# ---- launches ------------------------------------------------------------------------------------------------------


def skip_strides(D: Tensor | None) -> tuple[int, int]:
    """Those of D, which may have one value for all channels of a head."""
    return (0, 0) if D is None else (D.stride(0), D.stride(1) if D.dim() == 2 else 0)


class Passes:
    """What the passes over one call's arguments have in common, the first of which is made at once: per_step."""

    def __init__(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        dt_bias: Tensor | None,
        cu_seqlens: Tensor | None,
        dt_softplus: bool,
        dt_min: float,
        dt_max: float,
    ) -> None:
        batch, self.steps, self.heads, self.headdim = x.shape
        self.groups, self.dstate = B.shape[2:]
        self.of_group = self.heads // self.groups
        self.cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
        self.sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.precision = precision_of(x.dtype)
        self.cheaper = "tf32" if self.precision == "tf32x3" else self.precision  # of those that lead to x's dtype
        self.slots = slots_of(batch, self.steps, self.sequences, cu_seqlens)
        self.device = x.device
        self.per_step = self.float32(self.slots, self.heads, PLANES.value, CHUNK.value)
        ssd_steps_kernel[(self.slots, triton.cdiv(self.heads, BLOCK_H))](
            dt, A, dt_bias, self.cu_seqlens, self.per_step, self.heads, self.steps, self.sequences, dt_min, dt_max,
            *dt.stride(), A.stride(0), 0 if dt_bias is None else dt_bias.stride(0),
            dt_softplus, BLOCK_H, num_warps=NUM_WARPS, enable_fp_fusion=FP_FUSION,
        )  # fmt: skip

    def tiles(self, table: Table, precision: str | None = None) -> Tiles:
        """Those of this precision, or another, and chip, no larger than need be."""
        wide = 90 <= device_of(self.per_step).arch < 120
        tiles = INTERPRETED_TILES if INTERPRETED else table[precision or self.precision][wide]
        block_p = min(tiles.block_p, max(16, triton.next_power_of_2(self.headdim)))
        return tiles._replace(block_p=block_p, block_n=min(tiles.block_n, max(16, triton.next_power_of_2(self.dstate))))

    def float32(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def states(
        self, x: Tensor, z: Tensor | None, B: Tensor, first: Tensor | None, last: Tensor | None, backwards: bool
    ) -> Tensor:
        """(slots, H, P, N): the state before each chunk, or backwards, of dy, z and C, its gradient after; last becomes
        the state after the last chunk, or the gradient of the one before the first."""
        states = self.float32(self.slots, self.heads, self.headdim, self.dstate)
        tiles = self.tiles(STATE_TILES)
        blocks = triton.cdiv(self.headdim, tiles.block_p) * triton.cdiv(self.dstate, tiles.block_n)
        ssd_chunk_states_kernel[(self.slots * self.heads, blocks)](
            x, z, B, self.cu_seqlens, self.per_step, states,
            self.heads, self.of_group, self.headdim, self.dstate, self.steps, self.sequences,
            *x.stride(), *strides_of(z, 4), *B.stride(),
            backwards, self.precision, tiles.block_p, tiles.block_n, **tiles.options(),
        )  # fmt: skip
        size = self.headdim * self.dstate
        ssd_pass_states_kernel[(self.sequences * self.heads, triton.cdiv(size, BLOCK_STATE))](
            states, self.per_step, contiguous(first), last, self.cu_seqlens, self.heads, size, self.steps,
            backwards, BLOCK_STATE, num_warps=NUM_WARPS, enable_fp_fusion=FP_FUSION,
        )  # fmt: skip
        return states
