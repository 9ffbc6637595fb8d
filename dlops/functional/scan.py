"""State space models: the selective scan."""

import torch
from torch import Tensor

from dlops._op import acc
from dlops.functional._packed import check_cu_seqlens
from dlops.ops.scan import selective_scan as selective_scan_op


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The recurrence of Mamba's state space layers: per channel, with its own step size at every step,

        h[t] = exp(delta[t] A) h[t-1] + delta[t] u[t] B[t]
        y[t] = (C[t] . h[t] + D u[t]) * silu(z[t])

    Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023. The backward recomputes the
    states between checkpoints, so that it takes no more memory for a larger dstate. A GPU multiplies the decays of many
    steps before it applies them: states that grow by more than 3e38 within a chunk of steps, where delta A is positive,
    become NaN there even if they are zero.

    Args:
        u: (batch, dim, seqlen), float32, bfloat16, float16 or float64, in any strides; a transposed
            (batch, seqlen, dim) is as good.
        delta: u's shape and dtype.
        A: (dim, dstate), real or complex, dstate at most 256. With a complex A the state, B and C are complex64
            (complex128 with float64) and y takes twice the real part of C . h, as for a state with its conjugate.
        B, C: each (batch, dstate, seqlen) or (batch, groups, dstate, seqlen) in u's dtype, or (dim, dstate), the same
            at every step; groups divides dim, and channel i belongs to group i // (dim / groups).
        D, delta_bias: (dim,) or None.
        z: u's shape and dtype, or None: y is not gated.
        delta_softplus: take softplus(delta + delta_bias) for delta.
        initial_state: (batch, dim, dstate) or None, zero; float32 (float64 with float64), complex with A.
        return_last_state: return also h after the last step.
        cu_seqlens: (num_sequences + 1,) int32, from 0 to seqlen: sequence i is the steps from cu_seqlens[i] to
            cu_seqlens[i + 1] of the one batch element. The states are then (num_sequences, dim, dstate).

    A, D, delta_bias and a constant B or C are computed with in float32 (float64 with float64), the states too.

    Returns:
        y, shaped like u, in its dtype and, if it is channels-last, its layout; or ``(y, last_state)``.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit together.
        ValueError: cu_seqlens that does not go from 0 to seqlen, or decreases.
    """
    if cu_seqlens is not None:
        check_cu_seqlens("selective_scan", cu_seqlens, u, 2)
    B, C = (acc(x) if x.dim() == 2 else x[:, None] if x.dim() == 3 else x for x in (B, C))
    D, delta_bias = (x if x is None else acc(x) for x in (D, delta_bias))
    inputs = (u, delta, acc(A), B, C, D, z, delta_bias, initial_state)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    y, last_state, _ = selective_scan_op(*inputs, cu_seqlens, delta_softplus, save)
    return (y, last_state) if return_last_state else y
