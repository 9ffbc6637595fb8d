"""Functions of the package mamba_ssm, with its signatures, on :mod:`dlops.functional`."""

import functools
import math
from typing import Any

import torch
from torch import Tensor

from dlops import functional as F
from dlops._op import acc


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`dlops.functional.selective_scan`. With a complex A, a B or C that varies over time is real and has the two
    parts of step t at 2 t and 2 t + 1: (batch, dstate, 2 seqlen) or (batch, groups, dstate, 2 seqlen).

    Returns:
        y, or ``(y, last_state)``; gradients flow through the last state too.
    """
    if A.is_complex():
        B, C = (x if x.dim() == 2 else _as_complex(x, A.dtype) for x in (B, C))
    return F.selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state=return_last_state)


def _as_complex(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.view_as_complex(x.to(dtype.to_real()).unflatten(-1, (-1, 2)).contiguous())


@torch.no_grad()
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
    """:func:`dlops.functional.selective_state_update`, without a gradient; ``state`` is written in place.

    x, dt, z, B, C and the state may have different dtypes; y has that of x. One head's dimension may be there or not,
    in each of them by itself.
    """
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in (x, dt, B, C, z) if t is not None))
    heads = max(state.dim() - 3, x.dim() - 2, A.dim() - 2)

    def with_heads(t: Any, rank: int, dim: int) -> Any:
        """t, of so many dimensions without heads, where any argument has them."""
        return t if t is None or t.dim() == rank + heads else t.unsqueeze(dim)

    def step(t: Any) -> Any:
        return None if t is None else with_heads(t, 2, 1).to(dtype)

    entries = with_heads(state, 3, 1)
    wide = entries if state.dtype in (dtype, torch.promote_types(dtype, torch.float32)) else entries.to(dtype)
    y = F.selective_state_update(
        wide,
        step(x),
        step(dt),
        with_heads(A, 2, 0),
        B.to(dtype),
        C.to(dtype),
        with_heads(D, 1, 0),
        step(z),
        with_heads(dt_bias, 1, 0),
        dt_softplus,
        state_batch_indices,
    )
    if wide is not entries:
        entries.copy_(wide)
    return y.view(x.shape).to(x.dtype)


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """A Mamba mixer after its first projection: convolution with silu, the projections to the step sizes, B and C, the
    scan, its gate, and the last projection.

    Args:
        xz: (batch, 2 dim, seqlen), the scan's input and its gate.
        conv1d_weight: (dim, 1, width).
        x_proj_weight: (rank + 2 dstate, dim), to the step sizes' rank, B and C; with a complex A, 4 dstate.
        delta_proj_weight: (dim, rank).
        out_proj_weight, out_proj_bias: (d_model, dim) and (d_model,) or None.
        B, C: None, to be projected, or as :func:`selective_scan_fn` takes them.
        B_proj_bias, C_proj_bias: added to the projected B and C.
        checkpoint_lvl: 0 or 1, as in mamba_ssm; what the backward keeps does not depend on it.
        b_rms_weight, c_rms_weight, dt_rms_weight: (dstate,), (dstate,) and (dim,): B, C and the step sizes are
            normalised by their root mean square over these.

    Returns:
        (batch, seqlen, d_model).
    """
    if checkpoint_lvl not in (0, 1):
        raise ValueError(f"mamba_inner_fn: checkpoint_lvl is {checkpoint_lvl}, accepted are 0 and 1")
    rank, dstate = delta_proj_weight.shape[1], A.shape[1] * (2 if A.is_complex() else 1)
    x, z = xz.chunk(2, 1)
    u = F.causal_conv1d(x, conv1d_weight.squeeze(1), conv1d_bias, "silu")
    assert isinstance(u, Tensor)
    projected = F.linear(u.mT, x_proj_weight)

    def normed(x: Tensor, weight: Tensor | None) -> Tensor:
        return x if weight is None else F.rms_norm(x, [x.shape[-1]], weight, b_c_dt_rms_eps)

    def coefficient(given: Tensor | None, first: int, bias: Tensor | None, weight: Tensor | None) -> Tensor:
        if given is not None:
            return given if weight is None else normed(given.mT, weight).mT
        x = projected[..., first : first + dstate]
        x = normed(x if bias is None else x + bias.to(x.dtype), weight).mT
        return x.unflatten(1, (-1, 2)).transpose(2, 3).flatten(2) if A.is_complex() else x

    delta = normed(F.linear(projected[..., :rank], delta_proj_weight), dt_rms_weight).mT
    B = coefficient(B, rank, B_proj_bias, b_rms_weight)
    C = coefficient(C, rank + dstate, C_proj_bias, c_rms_weight)
    y = selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    assert isinstance(y, Tensor)
    return F.linear(y.mT, out_proj_weight, out_proj_bias)


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """:func:`dlops.functional.ssd_scan`.

    Args:
        chunk_size: positive; the result does not depend on it.
        cu_seqlens: read with return_varlen_states only, when it says where sequences begin, and seq_idx is not read.
            The initial states belong to the first sequence.

    Returns:
        y, with return_final_states also the states after the last step, with return_varlen_states also the last states
        of every sequence, (num_sequences, nheads, headdim, dstate). Gradients flow through all of them.
    """
    if chunk_size <= 0:
        raise ValueError(f"mamba_chunk_scan_combined: chunk_size is {chunk_size}, accepted are positive numbers")
    seq_idx, cu_seqlens = (None if t is None else t.int() for t in (seq_idx, cu_seqlens))
    bounds = cu_seqlens if return_varlen_states else None
    if return_varlen_states:
        if cu_seqlens is None:
            raise ValueError("mamba_chunk_scan_combined: return_varlen_states takes cu_seqlens, which is None")
        if initial_states is not None:
            others = initial_states.new_zeros(cu_seqlens.shape[0] - 2, *initial_states.shape[1:])
            initial_states = torch.cat([initial_states, others])
        seq_idx = None
    y, states = F.ssd_scan(
        x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, initial_states, True, seq_idx, cu_seqlens=bounds
    )
    found = (y, *([states[-1:] if return_varlen_states else states] if return_final_states else []))
    found = (*found, *([states] if return_varlen_states else []))
    return found if len(found) > 1 else y


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """A Mamba-2 mixer after its first projection: convolution, scan with softplus, gate, norm and last projection.

    Args:
        zxbcdt: (batch, seqlen, 2 d_mlp + 2 dim + 2 ngroups dstate + nheads): the two halves of a SwiGLU, which may be
            empty, the gate, the convolution's input (x, B and C) and the step sizes; dim is nheads headdim.
        conv1d_weight: (dim + 2 ngroups dstate, width).
        D: (nheads, headdim), or (nheads,) together with headdim.
        chunk_size: positive; the result does not depend on it.
        rmsnorm_weight: (dim,): what the scan returns is normalised by its root mean square over each group, after the
            gate or, with norm_before_gate, before it. None: it is gated alone.
        outproj_weight: (d_out, d_mlp + dim), or None: no projection, and no outproj_bias.

    Returns:
        (batch, seqlen, d_mlp + dim or d_out), and with return_final_states the scan's states after the last step.
    """
    if D.dim() == 1 and headdim is None:
        raise ValueError("mamba_split_conv1d_scan_combined: headdim is None, which takes D of (nheads, headdim)")
    if outproj_weight is None and outproj_bias is not None:
        raise ValueError("mamba_split_conv1d_scan_combined: outproj_weight is None, which takes no outproj_bias")
    nheads, headdim = D.shape[0], D.shape[1] if headdim is None or D.dim() == 2 else headdim
    dim, channels = nheads * headdim, conv1d_weight.shape[0]
    d_mlp = (zxbcdt.shape[-1] - dim - channels - nheads) // 2
    mlp, z, xBC, dt = zxbcdt.split([2 * d_mlp, dim, channels, nheads], -1)
    u = F.causal_conv1d(xBC.mT, conv1d_weight, conv1d_bias, activation, seq_idx=seq_idx)
    assert isinstance(u, Tensor)
    x, B, C = u.mT.split([dim, *[(channels - dim) // 2] * 2], -1)
    heads, groups = (nheads, headdim), (ngroups, -1)
    y, states = mamba_chunk_scan_combined(
        x.unflatten(-1, heads),
        dt,
        A,
        B.unflatten(-1, groups),
        C.unflatten(-1, groups),
        chunk_size,
        D,
        z.unflatten(-1, heads) if rmsnorm_weight is None else None,
        dt_bias,
        initial_states,
        seq_idx,
        dt_softplus=True,
        dt_limit=dt_limit,
        return_final_states=True,
    )
    y = y.flatten(-2)
    if rmsnorm_weight is not None:
        gate = torch.nn.functional.silu(acc(z))
        y = acc(y) if norm_before_gate else acc(y) * gate
        y = F.rms_norm(y.unflatten(-1, groups), [dim // ngroups], eps=rmsnorm_eps).flatten(-2) * rmsnorm_weight
        y = (y * gate if norm_before_gate else y).to(zxbcdt.dtype)
    if d_mlp > 0:
        left, right = mlp.chunk(2, -1)
        y = torch.cat([torch.nn.functional.silu(left) * right, y], -1)
    if outproj_weight is not None:
        y = F.linear(y, outproj_weight, outproj_bias)
    return (y, states) if return_final_states else y
