"""Decoding step by step: states that are kept between calls and advance in place."""

import torch
from torch import Tensor

from dlops._op import acc
from dlops.functional.conv1d import ACTIVATIONS
from dlops.ops.state_update import causal_conv1d_update as causal_conv1d_update_op
from dlops.ops.state_update import selective_state_update as selective_state_update_op


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """One step of :func:`selective_scan`, which advances ``state`` in place:

        state <- exp(dt A) state + dt x B
        y = (C . state + D x) * silu(z)

    There is no gradient: where one would be needed, it raises.

    Args:
        state: (batch, dim, dstate) or, with heads, (batch, nheads, head_dim, dstate), dstate at most 256, in x's dtype
            or float32 (float64 with float64), in any strides that overlap nowhere.
        x: (batch, dim) or (batch, nheads, head_dim), float32, bfloat16, float16 or float64.
        dt, z: x's shape and dtype; z None: y is not gated.
        A: (dim, dstate) or (nheads, head_dim, dstate).
        B, C: (batch, dstate) or, with heads, (batch, groups, dstate) in x's dtype; groups divides nheads, and head i
            belongs to group i // (nheads / groups).
        D, dt_bias: (dim,) or (nheads, head_dim), or None.
        dt_softplus: take softplus(dt + dt_bias) for dt.
        state_batch_indices: (batch,) int32 or int64: batch element i advances entry state_batch_indices[i] of
            ``state``, which then has any number of entries. They are distinct, or negative: such a batch element is
            padding, which advances nothing and whose y is zero.

    A, D and dt_bias are computed with in float32 (float64 with float64); where all of a head's are the same, expanded
    tensors serve.

    Returns:
        y, shaped like x, in its dtype.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit together, a state whose elements share memory, or a
            gradient that is asked for.
        ValueError: an index that is repeated or outside.
    """
    name = "selective_state_update"
    _check_writable(name, "state", state)
    state_batch_indices = _indices(name, "state_batch_indices", state_batch_indices, state)
    A = acc(A)
    D, dt_bias = (None if p is None else acc(p) for p in (D, dt_bias))
    B, C = (t[:, None] if t.dim() == 2 else t for t in (B, C))
    one_head = x.dim() == 2
    if one_head:
        x, dt, A = x[:, None], dt[:, None], A[None]
        z = None if z is None else z[:, None]
        D, dt_bias = (None if p is None else p[None] for p in (D, dt_bias))
        state = state[:, None] if state.dim() else state
    y = selective_state_update_op(x, dt, A, B, C, D, z, dt_bias, state, state_batch_indices, dt_softplus)
    return y.squeeze(1) if one_head else y


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
    dilation: int = 1,
) -> Tensor:
    """:func:`causal_conv1d` of the steps that follow those in ``conv_state``, which takes them up in place.

    There is no gradient: where one would be needed, it raises.

    Args:
        x: (batch, dim), one step, or (batch, dim, seqlen), float32, bfloat16, float16 or float64.
        conv_state: (batch, dim, state_len) in x's dtype, in any strides that overlap nowhere: the last steps, the
            newest at the end; state_len is at least (width - 1) * dilation. Zeros before the first step.
        weight: (dim, width), any width, in x's dtype or float32.
        bias: (dim,) in x's dtype or float32, or None.
        activation: None, "silu" or "swish", its other name.
        cache_seqlens: (batch,) int32, how many steps came before: ``conv_state`` is then a circular buffer, in which
            step t is kept at t % state_len, and nothing is shifted.
        conv_state_indices: (batch,) int32 or int64: batch element i goes on from entry conv_state_indices[i] of
            ``conv_state``, which then has any number of entries. They are distinct, or negative: such a batch element
            is padding, which goes on from nothing and whose y is zero.
        dilation: steps between the filter's taps.

    Returns:
        y, shaped like x, in its dtype.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit together, a state whose elements share memory, or a
            gradient that is asked for.
        ValueError: an unknown activation, a dilation < 1, an index that is repeated or outside.
    """
    name = "causal_conv1d_update"
    _check_writable(name, "conv_state", conv_state)
    conv_state_indices = _indices(name, "conv_state_indices", conv_state_indices, conv_state)
    if activation not in ACTIVATIONS:
        raise ValueError(f"{name}: activation is {activation!r}, accepted are None, 'silu' and 'swish'")
    one_step = x.dim() == 2
    y = causal_conv1d_update_op(
        x[..., None] if one_step else x,
        weight,
        bias,
        conv_state,
        cache_seqlens,
        conv_state_indices,
        ACTIVATIONS[activation],
        dilation,
    )
    return y.squeeze(-1) if one_step else y


def _check_writable(op: str, name: str, state: Tensor) -> None:
    """Every element has memory of its own, as far as torch can tell."""
    overlap = torch._debug_has_internal_overlap  # pyright: ignore[reportPrivateImportUsage]
    if not torch.compiler.is_compiling() and overlap(state) == 1:
        raise RuntimeError(
            f"{op}: several elements of {name}, of shape {tuple(state.shape)} and strides {state.stride()}, are one "
            f"place in memory; accepted is a state with a place for each, such as {name}.contiguous()"
        )


def _indices(op: str, name: str, indices: Tensor | None, state: Tensor) -> Tensor | None:
    """``indices`` as int32, their values checked where they can be read without waiting for a device."""
    if indices is None:
        return None
    if type(indices) is Tensor and indices.is_cpu and state.dim() and not torch.compiler.is_compiling():
        given, last = indices.flatten().tolist(), state.shape[0] - 1
        entries = [entry for entry in given if entry >= 0]
        if entries and (max(entries) > last or len(set(entries)) < len(entries)):
            raise ValueError(
                f"{op}: {name} is {given}, accepted are distinct numbers from 0 to {last}, and negative ones for none"
            )
    return indices.int() if indices.dtype == torch.int64 else indices
