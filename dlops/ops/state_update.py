"""One decoding step of state space models: the states kept between calls advance in place.

Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023; with heads, Dao and Gu,
"Transformers are SSMs", 2024 (Mamba-2).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dlops._op import acc, op
from dlops.ops._check import FLOATING, Arguments
from dlops.ops._layout import in_layout_of
from dlops.ops.conv1d import check_convolution, reach
from dlops.ops.scan import MAX_STATE

# ---- the selective scan's state ------------------------------------------------------------------------------------


def _check_selective_state_update(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
    state_batch_indices: Tensor | None,
    dt_softplus: bool,
) -> None:
    name = "selective_state_update"
    if x.dtype not in FLOATING:
        raise RuntimeError(f"{name}: x has dtype {x.dtype}, accepted are float32, bfloat16, float16 and float64")
    if x.dim() != 3:
        raise RuntimeError(f"{name}: x has shape {tuple(x.shape)}, accepted is (batch, nheads, head_dim)")
    batch, nheads, head_dim = x.shape
    real = torch.promote_types(x.dtype, torch.float32)
    if A.dim() != 3 or A.shape[:2] != x.shape[1:] or A.shape[2] > MAX_STATE:
        raise RuntimeError(
            f"{name}: A has shape {tuple(A.shape)}, accepted is (nheads, head_dim, dstate) = "
            f"({nheads}, {head_dim}, at most {MAX_STATE})"
        )
    dstate = A.shape[2]
    arguments = Arguments(name, "x", x)
    per_step = "(batch, nheads, head_dim)", x.shape
    per_channel = "(nheads, head_dim)", (nheads, head_dim)
    arguments.check("dt", dt, x.dtype, per_step)
    arguments.check("A", A, real, ("(nheads, head_dim, dstate)", (nheads, head_dim, dstate)))
    groups = B.shape[1] if B.dim() == 3 else 1
    if groups == 0 or nheads % groups:
        raise RuntimeError(f"{name}: B has {groups} groups, accepted are divisors of nheads = {nheads}")
    for argument, coefficient in (("B", B), ("C", C)):
        arguments.check(argument, coefficient, x.dtype, ("(batch, groups, dstate)", (batch, groups, dstate)))
    arguments.check("D", D, real, per_channel)
    arguments.check("z", z, x.dtype, per_step)
    arguments.check("dt_bias", dt_bias, real, per_channel)
    entries = _check_entries(arguments, "state", state, "state_batch_indices", state_batch_indices, batch)
    shape = f"({'batch' if state_batch_indices is None else 'entries'}, nheads, head_dim, dstate)"
    arguments.check("state", state, (real, x.dtype), (shape, (entries, nheads, head_dim, dstate)))


def _check_entries(
    arguments: Arguments, name: str, state: Tensor, indices_name: str, indices: Tensor | None, batch: int
) -> int:
    """How many entries the state has to have: one per batch element or, with indices, as many as it has."""
    if indices is None:
        return batch
    arguments.check(indices_name, indices, torch.int32, ("(batch,)", (batch,)))
    if state.dim() == 0:
        raise RuntimeError(f"{arguments.op}: {name} has shape (), accepted is one of (entries, ...)")
    return state.shape[0]


def _rows(state: Tensor, indices: Tensor) -> Tensor:
    """The entry of each batch element, and the one after the last where it has none."""
    entries = state.shape[0]
    return torch.where((indices >= 0) & (indices < entries), indices, entries).long()


def _entries(state: Tensor, indices: Tensor | None) -> Tensor:
    if indices is None:
        return state
    return torch.cat([state, state.new_zeros(1, *state.shape[1:])]).index_select(0, _rows(state, indices))


def _write_entries(state: Tensor, indices: Tensor | None, value: Tensor) -> None:
    value = value.to(state.dtype)
    if indices is not None:
        batch, places = value.shape[0], torch.arange(value.shape[0] + state.shape[0] + 1, device=state.device)
        kept = places[batch:].index_copy(0, _rows(state, indices), places[:batch])[:-1]
        value = torch.cat([value, state]).index_select(0, kept)
    state.copy_(value)


def _of_entries(y: Tensor, state: Tensor, indices: Tensor | None) -> Tensor:
    """y, zero where a batch element has no entry."""
    return y if indices is None else torch.where((_rows(state, indices) < state.shape[0])[:, None, None], y, 0)


@op(check=_check_selective_state_update, mutates=("state",))
def selective_state_update(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
    state_batch_indices: Tensor | None,
    dt_softplus: bool,
) -> Tensor:
    """state <- exp(dt A) state + dt x B; returns (C . state + D x) silu(z): a step of the selective scan per head.

    x, dt, z and the result are (batch, nheads, head_dim), A is (nheads, head_dim, dstate), B and C are (batch, groups,
    dstate), state is (entries, nheads, head_dim, dstate): batch element i advances entry state_batch_indices[i], or i,
    or none and its result is zero where that is negative.
    To dt dt_bias is added, and softplus applied, first. The result is that of the state before it is rounded.
    """
    step = acc(dt) if dt_bias is None else acc(dt) + dt_bias
    step = F.softplus(step) if dt_softplus else step
    B, C = (acc(g).repeat_interleave(x.shape[1] // g.shape[1], 1)[:, :, None] for g in (B, C))
    h = torch.exp(step[..., None] * A) * acc(_entries(state, state_batch_indices)) + (step * acc(x))[..., None] * B
    y = (h * C).sum(-1)
    y = y if D is None else y + D * acc(x)
    y = y if z is None else y * F.silu(acc(z))
    y = _of_entries(y, state, state_batch_indices)
    _write_entries(state, state_batch_indices, h)
    return y.to(x.dtype).clone(memory_format=torch.contiguous_format)


# ---- the convolution's state ---------------------------------------------------------------------------------------


def _check_causal_conv1d_update(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv_state: Tensor,
    cache_seqlens: Tensor | None,
    conv_state_indices: Tensor | None,
    activation: str,
    dilation: int,
) -> None:
    name = "causal_conv1d_update"
    arguments = check_convolution(name, x, weight, bias, activation, dilation)
    batch, dim, _ = x.shape
    arguments.check("cache_seqlens", cache_seqlens, torch.int32, ("(batch,)", (batch,)))
    entries = _check_entries(arguments, "conv_state", conv_state, "conv_state_indices", conv_state_indices, batch)
    if conv_state.shape[:2] != (entries, dim) or conv_state.dim() != 3 or conv_state.shape[2] < reach(weight, dilation):
        raise RuntimeError(
            f"{name}: conv_state has shape {tuple(conv_state.shape)}, accepted is (entries, dim, state_len) = "
            f"({entries}, {dim}, at least {reach(weight, dilation)})"
        )
    arguments.check("conv_state", conv_state, x.dtype, ("(entries, dim, state_len)", conv_state.shape))


@op(check=_check_causal_conv1d_update, mutates=("conv_state",))
def causal_conv1d_update(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv_state: Tensor,
    cache_seqlens: Tensor | None,
    conv_state_indices: Tensor | None,
    activation: str,
    dilation: int,
) -> Tensor:
    """:func:`causal_conv1d` of x (batch, dim, seqlen), the steps that follow those in conv_state (entries, dim,
    state_len), which becomes the last state_len of both. Batch element i goes on from entry conv_state_indices[i],
    or i, or from none and its result is zero where that is negative.

    With cache_seqlens (batch,), the steps so far, conv_state is a circular buffer: step t is kept at t % state_len.
    """
    seqlen, state_len = x.shape[2], conv_state.shape[2]
    before = _entries(conv_state, conv_state_indices)
    slots = None
    if cache_seqlens is not None:  # where the steps are, from the oldest on
        steps = torch.arange(state_len, device=x.device) + cache_seqlens[:, None]
        slots = (steps % max(state_len, 1))[:, None].expand(before.shape)
    joined = torch.cat([before if slots is None else before.gather(2, slots), x], 2)
    y = torch.zeros_like(acc(x)) if bias is None else acc(bias)[:, None].expand(x.shape)
    for tap in range(weight.shape[1]):
        first = state_len - (weight.shape[1] - 1 - tap) * dilation
        y = y + acc(joined.narrow(2, first, seqlen)) * acc(weight)[:, tap, None]
    after = joined.narrow(2, seqlen, state_len)
    if slots is not None:
        after = torch.zeros_like(before).scatter(2, (slots + seqlen) % max(state_len, 1), after)
    y = _of_entries(F.silu(y) if activation == "silu" else y, conv_state, conv_state_indices)
    _write_entries(conv_state, conv_state_indices, after)
    return in_layout_of(y.to(x.dtype), x)


# ---- backends ------------------------------------------------------------------------------------------------------


def _rule(*args: Any) -> Sequence[str]:
    return ("cpu", "torch") if args[0].is_cpu else ("cuda", "triton", "torch")


for _op in (selective_state_update, causal_conv1d_update):
    _op.rule = _rule
    for _name in ("cpu", "cuda", "triton"):
        _op.implement(_name)
