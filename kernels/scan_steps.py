"""What the kernels of the selective scan share: their tiles, and how they load the steps of one.

A tile is (T, D, N): steps, channels of one group, states. Steps that are not the sequence's leave its states alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import atanh_polynomial, exp
from .runtime import INTERPRETED, rounded

# Channels and states of a tile, of which every thread has one; steps, divisors of 64 and so of a chunk, are as many as
# its registers hold. The interpreter takes hardly longer for more.
BLOCK_D, BLOCK_N, NUM_WARPS = (64, 16, 4) if INTERPRETED else (16, 8, 4)
FORWARD_T, BACKWARD_T = (32, 32) if INTERPRETED else (16, 8)


def chunk_length(states: int) -> int:
    """Steps from one checkpoint to the next."""
    return 64 * max(1, triton.cdiv(states, 16))


def groups_of(B: Tensor, C: Tensor) -> int:
    """How many groups of channels there are, each of which has one B and one C."""
    return next((x.shape[1] for x in (B, C) if x.dim() == 4), 1)


def strides_of(x: Tensor | None, rank: int) -> tuple[int, ...]:
    """The strides of x if it has this rank, else zeros, which the kernels do not use."""
    return x.stride() if x is not None and x.dim() == rank else (0,) * rank


def states_from(initial: Tensor | None, A: Tensor, batch: int, cu_seqlens: Tensor | None) -> Tensor:
    """A state for each sequence, to be overwritten: a copy of the initial ones, or zeros."""
    if initial is not None:
        return initial.clone(memory_format=torch.contiguous_format)
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return torch.zeros(sequences, *A.shape, dtype=torch.float32, device=A.device)


def contiguous(x: Tensor | None) -> Tensor | None:
    return x if x is None else x.contiguous()


@triton.jit
def bounds_of(cu_seqlens, sequence, steps):
    """The sequence's batch element, its first step, and the one after its last."""
    if cu_seqlens is None:
        return sequence, 0, steps
    else:
        begin = tl.maximum(tl.load(cu_seqlens + sequence), 0)
        return sequence * 0, begin, tl.minimum(tl.load(cu_seqlens + sequence + 1), steps)


@triton.jit
def load_steps(x, t, d, stride_t, stride_d, mask):
    """(T, D) float32 of the steps t and the channels d; zero where masked off."""
    return tl.load(x + t.to(tl.int64)[:, None] * stride_t + d[None, :] * stride_d, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_steps(x, value, t, d, stride_t, stride_d, mask):
    """Rounds value (T, D) once."""
    offs = t.to(tl.int64)[:, None] * stride_t + d[None, :] * stride_d
    tl.store(x + offs, rounded(value, x.dtype.element_ty), mask=mask)


@triton.jit
def load_coefficient(x, t, d, n, stride_t, stride_n, mask_t, mask_d, mask_n, states, VARIES: tl.constexpr):
    """B or C, (T, 1, N) float32 if it varies over steps, else (1, D, N)."""
    if VARIES:
        offs = t.to(tl.int64)[:, None] * stride_t + n.to(tl.int64)[None, :] * stride_n
        return tl.load(x + offs, mask=mask_t[:, None] & mask_n[None, :], other=0.0).to(tl.float32)[:, None, :]
    else:
        offs = d[:, None] * states + n[None, :]
        return tl.load(x + offs, mask=mask_d[:, None] & mask_n[None, :], other=0.0)[None, :, :]


@triton.jit
def softplus(x):
    """log(1 + e^x) to 1.8 ulp, since the states' gradients multiply its errors: 2 atanh(s) with 2 s = e - s e."""
    e = exp(-tl.abs(x))
    s = e / (2.0 + e)
    z = s * s
    return tl.where(x > 20.0, x, tl.maximum(x, 0.0) + (e - s * (e - 2.0 * z * atanh_polynomial(z))))


@triton.jit
def load_sizes(delta, bias, t, d, stride_t, stride_d, mask, mask_d, SOFTPLUS: tl.constexpr):
    """Step sizes (T, D) float32, zero where masked off, and delta + delta_bias, which they come from."""
    raw = load_steps(delta, t, d, stride_t, stride_d, mask)
    if bias is not None:
        raw += tl.load(bias + d, mask=mask_d, other=0.0)[None, :]
    size = softplus(raw) if SOFTPLUS else raw
    return tl.where(mask, size, 0.0), raw


@triton.jit
def decays(step, rate, inside):
    """exp(step A), (T, D, N), for rate = A log2 e; 1 at steps that are not inside."""
    return tl.where(inside[:, None, None], tl.exp2(step[:, :, None] * rate[None, :, :]), 1.0)


@triton.jit
def at_step(x, i):
    """x (T, D, N) at step i."""
    return tl.sum(tl.where((tl.arange(0, x.shape[0]) == i)[:, None, None], x, 0.0), 0)


@triton.jit
def with_step(x, i, value):
    """x (T, D, N), but at step i value (D, N)."""
    return tl.where((tl.arange(0, x.shape[0]) == i)[:, None, None], value[None, :, :], x)


@triton.jit
def advance(decay, value, next_decay, next_value):
    """h -> decay h + value, and after it the next."""
    return decay * next_decay, next_decay * value + next_value


@triton.jit
def states_after(h, decay, value):
    """(T, D, N): the states after each step from h (D, N) on."""
    value += with_step(tl.zeros_like(value), 0, at_step(decay, 0) * h)
    _, after = tl.associative_scan((decay, value), 0, advance)
    return after
