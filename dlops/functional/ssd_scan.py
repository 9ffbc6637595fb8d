"""The scan of Mamba-2."""

import math

import torch
from torch import Tensor

from dlops._op import acc
from dlops.functional._packed import check_cu_seqlens
from dlops.ops._check import Arguments
from dlops.ops.ssd_scan import ssd_scan as ssd_scan_op


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The recurrence of Mamba-2: per head, with a state (headdim, dstate) that decays as a whole,

        S[t] = exp(dt[t] A) S[t-1] + dt[t] x[t] B[t]^T
        y[t] = (S[t] C[t] + D x[t]) * silu(z[t])

    Dao and Gu, "Transformers are SSMs", 2024.

    Args:
        x: (batch, seqlen, nheads, headdim), float32, bfloat16, float16 or float64, in any strides.
        dt: (batch, seqlen, nheads), x's dtype or float32 (float64 with float64).
        A: (nheads,).
        B, C: (batch, seqlen, ngroups, dstate), x's dtype; ngroups divides nheads, dstate is at most 256, and head i
            belongs to group i // (nheads / ngroups).
        D: (nheads,) or (nheads, headdim), or None.
        z: x's shape and dtype, or None: y is not gated.
        dt_bias: (nheads,) or None, added to dt.
        dt_softplus: take softplus(dt + dt_bias) for dt.
        dt_limit: what dt is clamped to after that.
        initial_states: (batch, nheads, headdim, dstate) or None, zero; float32 (float64 with float64).
        return_final_states: return also S after the last step.
        seq_idx: (batch, seqlen) int32 or int64: a new sequence, of zero state, begins where it changes. The initial
            states belong to the first step's sequence, the final states to the last step's. Its values are read on the
            host.
        cu_seqlens: (num_sequences + 1,) int32, from 0 to seqlen: sequence i is the steps from cu_seqlens[i] to
            cu_seqlens[i + 1] of the one batch element. The states are then (num_sequences, ...).

    A, D, dt, dt_bias and the states are computed with in float32 (float64 with float64).

    Returns:
        y, shaped like x, in its dtype; or ``(y, final_states)``.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit together.
        ValueError: seq_idx together with cu_seqlens, cu_seqlens that does not go from 0 to seqlen, or decreases.
    """
    if cu_seqlens is not None:
        if seq_idx is not None:
            raise ValueError("ssd_scan: got seq_idx and cu_seqlens, accepted is one of them")
        check_cu_seqlens("ssd_scan", cu_seqlens, x, 1)
    A = acc(A)
    D, dt_bias, states = (t if t is None else acc(t) for t in (D, dt_bias, initial_states))
    values = dt_softplus, *map(float, dt_limit)
    if seq_idx is not None:
        ssd_scan_op.check(x, dt, A, B, C, D, z, dt_bias, states, None, *values)
        accepted = "(batch, seqlen)", x.shape[:2]
        Arguments("ssd_scan", "x", x).check("seq_idx", seq_idx, (torch.int32, torch.int64), accepted)
    if seq_idx is None or seq_idx.numel() == 0:
        y, final = ssd_scan_op(x, dt, A, B, C, D, z, dt_bias, states, cu_seqlens, *values)
    else:
        bounds, first = _packed(seq_idx)
        if states is not None:
            states = states.new_zeros(bounds.shape[0] - 1, *states.shape[1:]).index_copy(0, first[:-1], states)
        x, dt, B, C = (t.flatten(0, 1)[None] for t in (x, dt, B, C))
        z = None if z is None else z.flatten(0, 1)[None]
        y, final = ssd_scan_op(x, dt, A, B, C, D, z, dt_bias, states, bounds, *values)
        y, final = y[0].unflatten(0, seq_idx.shape), final[first[1:] - 1]
    return (y, final) if return_final_states else y


def _packed(seq_idx: Tensor) -> tuple[Tensor, Tensor]:
    """cu_seqlens of all sequences of the batch behind each other, and each batch element's first sequence, with the
    number of all at the end."""
    new = torch.ones_like(seq_idx, dtype=torch.bool)
    new[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    end = torch.tensor([seq_idx.numel()], device=seq_idx.device)
    begin = torch.cat([new.flatten().nonzero()[:, 0], end])
    first = torch.arange(seq_idx.shape[0] + 1, device=seq_idx.device) * seq_idx.shape[1]
    return begin.int(), torch.searchsorted(begin, first)
