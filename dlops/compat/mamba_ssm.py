"""Functions of the package mamba_ssm, with its signatures, on :mod:`dlops.functional`."""

import torch
from torch import Tensor

from dlops import functional as F


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
    """:func:`dlops.functional.selective_state_update`, without a gradient; ``state`` is written in place."""
    return F.selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices)


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
