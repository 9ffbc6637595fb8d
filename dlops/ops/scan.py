"""The selective scan of state space models: a linear recurrence whose coefficients depend on the input.

Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023; with constant B and C and a
complex A, the recurrence of S4 and S4D.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dlops._op import acc, op
from dlops.ops._check import FLOATING, Arguments
from dlops.ops._layout import asked_for, channels_last, empty_in_layout_of

MAX_STATE = 256


def chunk_length(dstate: int) -> int:
    """Steps from one checkpoint to the next: so many that they take no more than a quarter of u's elements."""
    return 64 * max(1, (dstate + 15) // 16)


# ---- checks --------------------------------------------------------------------------------------------------------


def _check_selective_scan(
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
) -> None:
    if u.dtype not in FLOATING:
        raise RuntimeError(
            f"selective_scan: u has dtype {u.dtype}, accepted are float32, bfloat16, float16 and float64"
        )
    if u.dim() != 3:
        raise RuntimeError(f"selective_scan: u has shape {tuple(u.shape)}, accepted is (batch, dim, seqlen)")
    batch, dim, seqlen = u.shape
    real = torch.promote_types(u.dtype, torch.float32)
    state = real.to_complex() if A.is_complex() else real
    if A.dim() != 2 or A.shape[0] != dim or A.shape[1] > MAX_STATE:
        raise RuntimeError(
            f"selective_scan: A has shape {tuple(A.shape)}, accepted is (dim, dstate) = ({dim}, at most {MAX_STATE})"
        )
    arguments = Arguments("selective_scan", "u", u)
    dstate = A.shape[1]
    per_step = "(batch, dim, seqlen)", u.shape
    per_channel = "(dim,)", (dim,)
    arguments.check("delta", delta, u.dtype, per_step)
    arguments.check("A", A, state, ("(dim, dstate)", (dim, dstate)))
    groups = next((x.shape[1] for x in (B, C) if x.dim() == 4), 1)
    if groups == 0 or dim % groups:
        raise RuntimeError(f"selective_scan: B has {groups} groups, accepted are divisors of dim = {dim}")
    varying = "(batch, groups, dstate, seqlen)", (batch, groups, dstate, seqlen)
    for name, x in (("B", B), ("C", C)):
        dtype = u.dtype if x.dim() == 4 and not A.is_complex() else state
        arguments.check(name, x, dtype, ("(dim, dstate)", (dim, dstate)), varying)
    arguments.check("D", D, real, per_channel)
    arguments.check("z", z, u.dtype, per_step)
    arguments.check("delta_bias", delta_bias, real, per_channel)
    sequences, count = arguments.sequences(batch, cu_seqlens)
    arguments.check("initial_state", initial_state, state, (f"({sequences}, dim, dstate)", (count, dim, dstate)))


# ---- the recurrence ------------------------------------------------------------------------------------------------


@dataclass
class _Packing:
    """Where packed sequences begin and end: a one-element tensor per step, and two vectors over sequences."""

    sequence: Sequence[Tensor]  # the step's sequence
    first: Sequence[Tensor]  # whether it is that sequence's first step
    final: Sequence[Tensor]  # or its last
    begin: Tensor  # the first step of each sequence; of an empty one, some step
    end: Tensor  # the last
    empty: Tensor  # (num_sequences, 1, 1)

    @staticmethod
    def of(cu_seqlens: Tensor, seqlen: int) -> "_Packing":
        begin, end = cu_seqlens[:-1], cu_seqlens[1:]
        position = torch.arange(seqlen, device=cu_seqlens.device)
        sequence = torch.searchsorted(end.contiguous(), position, right=True)  # of several, the one that is not empty
        return _Packing(
            sequence.split(1),
            (begin[sequence] == position).split(1),
            (end[sequence] == position + 1).split(1),
            begin.clamp(max=max(seqlen - 1, 0)),
            (end - 1).clamp(min=0),
            (begin == end)[:, None, None],
        )

    def enter(self, t: int, h: Tensor, initial: Tensor) -> Tensor:
        """``h`` before step t, or the initial state of the sequence that begins there."""
        return torch.where(self.first[t], initial.index_select(0, self.sequence[t]), h)

    def leave(self, t: int, dh: Tensor, dlast: Tensor) -> Tensor:
        """The gradient of the state after step t: ``dh``, or that of the last state of the sequence that ends there."""
        return torch.where(self.final[t], dlast.index_select(0, self.sequence[t]), dh)

    def select(self, states: Sequence[Tensor], index: Tensor, otherwise: Tensor) -> Tensor:
        """One of a state per step for each sequence; of an empty one, what it has in ``otherwise``."""
        return torch.where(self.empty, otherwise, torch.cat([*states])[index]) if states else otherwise


def _by_step(x: Tensor, dim: int) -> Sequence[Tensor]:
    """Per step, x (batch, dim, seqlen) as (batch, dim), and x (batch, groups, dstate, seqlen) as (batch, dim, dstate)
    or, of one group, (batch, 1, dstate)."""
    steps = acc(x).unbind(-1)
    return [s.repeat_interleave(dim // s.shape[1], 1) for s in steps] if x.dim() == 4 and x.shape[1] > 1 else steps


def _coefficient(x: Tensor, dim: int) -> Iterator[Tensor]:
    """B or C per step."""
    return iter(_by_step(x, dim)) if x.dim() == 4 else itertools.repeat(x)


def _states(
    steps: Sequence[Tensor],
    inputs: Sequence[Tensor],
    A: Tensor,
    B: Tensor,
    initial: Tensor,
    packing: _Packing | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The states before and after every step: h[t] = exp(delta[t] A) h[t-1] + delta[t] u[t] B[t]."""
    h = initial if packing is None else torch.zeros_like(A)[None]
    for t, (delta_t, u_t, B_t) in enumerate(zip(steps, inputs, _coefficient(B, A.shape[0]), strict=False)):
        before = h if packing is None else packing.enter(t, h, initial)
        h = torch.exp(delta_t[..., None] * A) * before + (delta_t * u_t)[..., None] * B_t
        yield before, h


def _steps(delta: Tensor, delta_bias: Tensor | None, delta_softplus: bool) -> tuple[Tensor, Tensor]:
    """The step sizes in float32, and their derivative with respect to delta."""
    raw = acc(delta) if delta_bias is None else acc(delta) + delta_bias[:, None]
    return (F.softplus(raw), torch.sigmoid(raw)) if delta_softplus else (raw, torch.ones_like(raw))


def _initial(initial_state: Tensor | None, A: Tensor, batch: int, cu_seqlens: Tensor | None) -> Tensor:
    if initial_state is not None:
        return initial_state
    return A.new_zeros(batch if cu_seqlens is None else cu_seqlens.shape[0] - 1, *A.shape)


def _stacked(steps: Sequence[Tensor], like: Tensor) -> Tensor:
    """A (batch, dim) per step as (batch, dim, seqlen) in the dtype of ``like``: channels last in memory if that is."""
    if not steps:
        return empty_in_layout_of(like)
    rounded = [step.to(like.dtype) for step in steps]
    return torch.stack(rounded, 1).mT if channels_last(like) else torch.stack(rounded, -1)


def _fake_selective_scan(
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
    batch, _, seqlen = u.shape
    chunk = chunk_length(A.shape[1])
    dim, dstate = A.shape
    checkpoints = A.new_empty(batch, (seqlen + chunk - 1) // chunk * dim, dstate) if save else A.new_empty(0)
    return empty_in_layout_of(u), torch.empty_like(_initial(None, A, batch, cu_seqlens)), checkpoints


def _fake_selective_scan_backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def coefficient(x: Tensor) -> Tensor:
        return x.new_empty(x.shape) if x.dim() == 2 else x.new_empty(*x.shape[:2], x.shape[3], x.shape[2]).mT

    state = torch.empty_like(_initial(None, A, u.shape[0], cu_seqlens))
    channels = A.new_empty(A.shape[0], dtype=acc(u.new_empty(0)).dtype)
    found = (
        empty_in_layout_of(u),
        empty_in_layout_of(delta),
        A.new_empty(A.shape),
        coefficient(B),
        coefficient(C),
        channels,
        empty_in_layout_of(u if z is None else z),
        torch.empty_like(channels),
        state,
    )
    return asked_for(found, u, output_mask)


# ---- definitions ---------------------------------------------------------------------------------------------------


@op(returns=("y", "last_state", "checkpoints"), check=_check_selective_scan, fake=_fake_selective_scan)
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
    """h[t] = exp(delta[t] A) h[t-1] + delta[t] u[t] B[t] and y[t] = (C[t] . h[t] + D u[t]) silu(z[t]) per channel.

    u, delta, z and y are (batch, dim, seqlen), y channels-last in memory if u is; A is (dim, dstate), B and C are that
    or (batch, groups, dstate, seqlen). With a complex A, C . h is twice its real part. To delta delta_bias is added,
    and softplus applied, first. With ``save``, checkpoints (batch, chunks * dim, dstate) holds the states before every
    step that is a multiple of :func:`chunk_length`; a dimension of chunks alone would be a guard of traced graphs.
    """
    batch, dim, seqlen = u.shape
    packing = None if cu_seqlens is None else _Packing.of(cu_seqlens, seqlen)
    initial = _initial(initial_state, A, batch, cu_seqlens)
    steps, inputs = _by_step(_steps(delta, delta_bias, delta_softplus)[0], dim), _by_step(u, dim)
    gates = itertools.repeat(None) if z is None else iter(_by_step(F.silu(acc(z)), dim))
    ys, states, saved, last = [], [], [], initial
    pairs = _states(steps, inputs, A, B, initial, packing)
    for t, ((before, h), u_t, C_t, gate) in enumerate(zip(pairs, inputs, _coefficient(C, dim), gates, strict=False)):
        if save and t % chunk_length(A.shape[1]) == 0:
            saved.append(before)
        y = (h * C_t).sum(-1)
        y = 2 * y.real if A.is_complex() else y
        y = y if D is None else y + D * u_t
        ys.append(y if gate is None else y * gate)
        last = h
        if packing is not None:
            states.append(h)
    if packing is not None:
        last = packing.select(states, packing.end, initial)
    checkpoints = torch.cat(saved, 1) if saved else A.new_empty(batch, 0, A.shape[1]) if save else A.new_empty(0)
    return _stacked(ys, u), last.clone(memory_format=torch.contiguous_format), checkpoints


@op(
    returns=("du", "ddelta", "dA", "dB", "dC", "dD", "dz", "ddelta_bias", "dinitial_state"),
    fake=_fake_selective_scan_backward,
)
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`selective_scan`, by the recurrence that runs backwards in time."""
    batch, dim, seqlen = u.shape
    packing = None if cu_seqlens is None else _Packing.of(cu_seqlens, seqlen)
    initial = _initial(initial_state, A, batch, cu_seqlens)
    dlast = _initial(dlast_state, A, batch, cu_seqlens)
    step_sizes, slopes = (_by_step(x, dim) for x in _steps(delta, delta_bias, delta_softplus))
    us, dys, gates = _by_step(u, dim), _by_step(dy, dim), _by_step(torch.zeros_like(u) if z is None else z, dim)
    states = list(_states(step_sizes, us, A, B, initial, packing))
    Bs, Cs = (list(itertools.islice(_coefficient(x, dim), seqlen)) for x in (B, C))
    zero = torch.zeros_like(step_sizes[0]) if seqlen else acc(u.new_zeros(batch, dim))
    dD, ddelta_bias, dA = zero, zero, A.new_zeros(batch, *A.shape)
    found: list[tuple[Tensor, ...]] = []
    dh = dlast if packing is None else torch.zeros_like(A)[None]
    for t in reversed(range(seqlen)):
        (before, h), delta_t, u_t, B_t, C_t = states[t], step_sizes[t], us[t], Bs[t], Cs[t]
        dy_t, dz_t = dys[t], zero
        if z is not None:
            y = (h * C_t).sum(-1)
            y = 2 * y.real if A.is_complex() else y
            y = y if D is None else y + D * u_t
            sigmoid = torch.sigmoid(gates[t])
            dz_t = dy_t * y * sigmoid * (1 + gates[t] * (1 - sigmoid))
            dy_t = dy_t * gates[t] * sigmoid
        dD = dD + dy_t * u_t
        dproduct = ((2 if A.is_complex() else 1) * dy_t)[..., None]
        dh = dh if packing is None else packing.leave(t, dh, dlast)
        dh = dh + dproduct * C_t.conj()
        du_t = (dh * B_t.conj()).sum(-1).real
        decay = torch.exp(delta_t[..., None] * A)
        ddecay = dh * (decay * before).conj()  # the gradient of delta[t] A
        ddelta_t = ((ddecay * A.conj()).sum(-1).real + du_t * u_t) * slopes[t]
        ddelta_bias = ddelta_bias + ddelta_t
        dA = dA + ddecay * delta_t[..., None]
        dB_t, dC_t = dh * (delta_t * u_t)[..., None], dproduct * h.conj()
        du_t = du_t * delta_t if D is None else du_t * delta_t + dy_t * D
        dh = dh * decay.conj()
        found.append((du_t, ddelta_t, dB_t, dC_t, dz_t, dh))
    found.reverse()
    du, ddelta, dB, dC, dz, dhs = zip(*found, strict=True) if found else ((), (), (), (), (), ())
    dinitial = dh if packing is None else packing.select(dhs, packing.begin, dlast)
    gradients = (
        _stacked(du, u),
        _stacked(ddelta, delta),
        dA.sum(0),
        _coefficient_gradient(dB, B),
        _coefficient_gradient(dC, C),
        dD.sum(0),
        _stacked(dz, u if z is None else z),
        ddelta_bias.sum(0),
        dinitial.clone(memory_format=torch.contiguous_format),
    )
    return asked_for(gradients, u, output_mask)


def _per_group(x: Tensor, groups: int) -> Tensor:
    """(batch, dim, dstate) as (batch, groups, dim / groups, dstate)."""
    batch, dim, dstate = x.shape
    return x.reshape(batch, groups, dim // groups, dstate)


def _coefficient_gradient(steps: Sequence[Tensor], x: Tensor) -> Tensor:
    """The gradient of B or C from one (batch, dim, dstate) per step."""
    if x.dim() == 2:
        return sum((step.sum(0) for step in reversed(steps)), x.new_zeros(x.shape))
    if not steps:
        return x.new_empty(*x.shape[:2], 0, x.shape[2]).mT
    return torch.stack([_per_group(step, x.shape[1]).sum(2).to(x.dtype) for step in steps], 2).mT


# ---- gradients -----------------------------------------------------------------------------------------------------


def _selective_scan_formula(
    grads: Sequence[Any], args: Sequence[Any], extras: Sequence[Tensor], mask: list[bool]
) -> Sequence[Tensor | None]:
    dy, dlast_state, _ = grads
    *tensors, delta_softplus, save = args
    checkpoints = extras[0] if save else selective_scan(*args[:-1], True)[2]
    dy = torch.zeros_like(args[0]) if dy is None else dy
    gradients = selective_scan_backward(dy, *tensors, dlast_state, checkpoints, delta_softplus, mask[:9])
    return *gradients, None, None, None


selective_scan.register_autograd(
    _selective_scan_formula,
    saves=lambda args, outputs: (args, outputs[2:]),
    non_differentiable=("checkpoints",),
)


# ---- backends ------------------------------------------------------------------------------------------------------


def _rule(*args: Any) -> Sequence[str]:
    return ("cpu", "torch") if args[0].is_cpu else ("cuda", "triton", "torch")


def _complex(*args: Any) -> str | None:
    if any(isinstance(a, Tensor) and a.is_complex() for a in args):
        return "it serves a real A, got a complex one"
    return None


for _op in (selective_scan, selective_scan_backward):
    _op.rule = _rule
    _op.implement("cpu")
    _op.implement("cuda", refuses=_complex)
    _op.implement("triton", refuses=_complex)
