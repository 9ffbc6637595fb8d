"""The scan of Mamba-2: a selective scan whose heads of channels share one step size and one decay.

Dao and Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality",
2024.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dlops._op import acc, op
from dlops.ops._check import FLOATING, Arguments
from dlops.ops._layout import asked_for
from dlops.ops.scan import MAX_STATE, selective_scan, selective_scan_backward


def _check(
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
) -> None:
    if x.dtype not in FLOATING:
        raise RuntimeError(f"ssd_scan: x has dtype {x.dtype}, accepted are float32, bfloat16, float16 and float64")
    if x.dim() != 4:
        raise RuntimeError(f"ssd_scan: x has shape {tuple(x.shape)}, accepted is (batch, seqlen, nheads, headdim)")
    batch, seqlen, heads, headdim = x.shape
    if B.dim() != 4 or B.shape[2] == 0 or heads % B.shape[2] or B.shape[3] > MAX_STATE:
        raise RuntimeError(
            f"ssd_scan: B has shape {tuple(B.shape)}, accepted is (batch, seqlen, ngroups, dstate) with groups that "
            f"divide nheads = {heads} and dstate at most {MAX_STATE}"
        )
    real = torch.promote_types(x.dtype, torch.float32)
    arguments = Arguments("ssd_scan", "x", x)
    per_group = "(batch, seqlen, ngroups, dstate)", (batch, seqlen, *B.shape[2:])
    arguments.check("dt", dt, (x.dtype, real), ("(batch, seqlen, nheads)", x.shape[:3]))
    arguments.check("A", A, real, ("(nheads,)", (heads,)))
    arguments.check("B", B, x.dtype, per_group)
    arguments.check("C", C, x.dtype, per_group)
    arguments.check("D", D, real, ("(nheads,)", (heads,)), ("(nheads, headdim)", (heads, headdim)))
    arguments.check("z", z, x.dtype, ("(batch, seqlen, nheads, headdim)", x.shape))
    arguments.check("dt_bias", dt_bias, real, ("(nheads,)", (heads,)))
    sequences, count = arguments.sequences(batch, cu_seqlens)
    state = count, heads, headdim, B.shape[3]
    arguments.check("initial_states", initial_states, real, (f"({sequences}, nheads, headdim, dstate)", state))


# ---- as a selective scan -------------------------------------------------------------------------------------------


def _steps(
    dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dt_min: float, dt_max: float
) -> tuple[Tensor, Tensor]:
    """The step sizes, and their derivative with respect to dt."""
    raw = acc(dt) if dt_bias is None else acc(dt) + dt_bias
    steps = F.softplus(raw) if dt_softplus else raw
    slope = torch.sigmoid(raw) if dt_softplus else torch.ones_like(raw)
    return steps.clamp(dt_min, dt_max), torch.where((steps >= dt_min) & (steps <= dt_max), slope, 0)


def _channels(x: Tensor) -> Tensor:
    """(batch, seqlen, heads, headdim) as (batch, channels, seqlen)."""
    return x.reshape(*x.shape[:2], x.shape[2] * x.shape[3]).mT


def _heads(x: Tensor, like: Tensor) -> Tensor:
    """Undoes :func:`_channels`."""
    return x.mT.reshape(like.shape)


def _per_channel(x: Tensor, headdim: int) -> Tensor:
    """(..., heads) as (..., channels)."""
    return x[..., None].expand(*x.shape, headdim).reshape(*x.shape[:-1], x.shape[-1] * headdim)


def _state_of_channels(states: Tensor) -> Tensor:
    """(sequences, heads, headdim, dstate) as (sequences, channels, dstate)."""
    sequences, heads, headdim, dstate = states.shape
    return states.reshape(sequences, heads * headdim, dstate)


def _arguments(
    x: Tensor,
    steps: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Any, ...]:
    """Those of selective_scan. Float32 step sizes stay float32 whatever x is."""
    headdim = x.shape[3]
    if D is not None:
        D = _per_channel(D, headdim) if D.dim() == 1 else D.flatten()
    return (
        _channels(x),
        _per_channel(steps, headdim).mT,
        _per_channel(A, headdim)[:, None].expand(-1, B.shape[3]),
        B.permute(0, 2, 3, 1),
        C.permute(0, 2, 3, 1),
        D,
        None if z is None else _channels(z),
        None,
        None if initial_states is None else _state_of_channels(initial_states),
        cu_seqlens,
    )


# ---- definitions ---------------------------------------------------------------------------------------------------


def _state_like(x: Tensor, B: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(sequences, *x.shape[2:], B.shape[3], dtype=torch.promote_types(x.dtype, torch.float32))


def _fake(
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
    return x.new_empty(x.shape), _state_like(x, B, cu_seqlens)


@op(returns=("y", "final_states"), check=_check, fake=_fake)
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
    """S[t] = exp(dt[t] A) S[t-1] + dt[t] x[t] B[t]^T and y[t] = (S[t] C[t] + D x[t]) silu(z[t]) per head.

    x, z and y are (batch, seqlen, heads, headdim), dt (batch, seqlen, heads), B and C (batch, seqlen, groups, dstate).
    To dt dt_bias is added, softplus applied, and it is clamped to [dt_min, dt_max], first.
    """
    steps, _ = _steps(dt, dt_bias, dt_softplus, dt_min, dt_max)
    arguments = _arguments(x, steps, A, B, C, D, z, initial_states, cu_seqlens)
    y, states, _ = selective_scan.definition(*arguments, False, False)
    return _heads(y, x).clone(memory_format=torch.contiguous_format), states.unflatten(1, x.shape[2:])


def _fake_backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    tensors = (x, dt, A, B, C, A if D is None else D, x if z is None else z, A)
    found = (*(t.new_empty(t.shape) for t in tensors), _state_like(x, B, cu_seqlens))
    return asked_for(found, x, output_mask)


@op(
    returns=("dx", "ddt", "dA", "dB", "dC", "dD", "dz", "ddt_bias", "dinitial_states"),
    fake=_fake_backward,
)
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`ssd_scan`, by the recurrence that runs backwards in time."""
    steps, slope = _steps(dt, dt_bias, dt_softplus, dt_min, dt_max)
    arguments = _arguments(x, steps, A, B, C, D, z, initial_states, cu_seqlens)
    dfinal = None if dfinal_states is None else _state_of_channels(dfinal_states)
    du, ddelta, dA, dB, dC, dD, dz, _, dinitial = selective_scan_backward.definition(
        _channels(dy), *arguments, dfinal, A.new_empty(0), False, [True] * 9
    )
    heads = x.shape[2:]
    ddt = ddelta.mT.reshape(x.shape).sum(3) * slope
    dD = dD.reshape(heads)
    found = (
        _heads(du, x),
        ddt.to(dt.dtype),
        dA.reshape(*heads, B.shape[3]).sum((1, 2)),
        dB.permute(0, 3, 1, 2),
        dC.permute(0, 3, 1, 2),
        dD.sum(1) if D is None or D.dim() == 1 else dD,
        _heads(dz, x),
        ddt.sum((0, 1)),
        dinitial.reshape(dinitial.shape[0], *heads, B.shape[3]),
    )
    return asked_for([t.clone(memory_format=torch.contiguous_format) for t in found], x, output_mask)


# ---- gradients -----------------------------------------------------------------------------------------------------


def _formula(
    grads: Sequence[Any], args: Sequence[Any], extras: Sequence[Tensor], mask: list[bool]
) -> Sequence[Tensor | None]:
    dy, dfinal_states = grads
    *tensors, dt_softplus, dt_min, dt_max = args
    dy = torch.zeros_like(args[0]) if dy is None else dy
    gradients = ssd_scan_backward(dy, *tensors, dfinal_states, dt_softplus, dt_min, dt_max, mask[:9])
    return *gradients, None, None, None, None


ssd_scan.register_autograd(_formula)


# ---- backends ------------------------------------------------------------------------------------------------------


def _rule(*args: Any) -> Sequence[str]:
    return ("cpu", "torch") if args[0].is_cpu else ("triton", "torch")


for _op in (ssd_scan, ssd_scan_backward):
    _op.rule = _rule
    _op.implement("cpu")
    _op.implement("triton")
