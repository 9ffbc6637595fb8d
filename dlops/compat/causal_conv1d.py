"""The functions of the package causal_conv1d, with its signatures, on :mod:`dlops.functional`.

Any width, device and layout; seq_idx may come together with states.
"""

import torch
from torch import Tensor

from dlops import functional as F
from dlops._op import acc


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`dlops.functional.causal_conv1d`: x (batch, dim, seqlen), weight (dim, width).

    Args:
        final_states_out: (batch, dim, width - 1), which the final states are written to and returned in.

    Returns:
        y, or ``(y, final_states)`` with ``return_final_states``.

    Raises:
        NotImplementedError: an activation that is not None, "silu" or "swish".
        RuntimeError: shapes, dtypes or devices that do not fit together.
    """
    _check_activation(activation)
    if weight.dtype != x.dtype:  # as here the original takes any two
        weight, bias = acc(weight), None if bias is None else acc(bias)
    found = F.causal_conv1d(x, weight, bias, activation, initial_states, return_final_states, seq_idx)
    if isinstance(found, Tensor):
        return found
    y, final_states = found
    return y, final_states if final_states_out is None else final_states_out.copy_(final_states)


@torch.no_grad()
def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """:func:`dlops.functional.causal_conv1d_update`, without a gradient: x (batch, dim) or (batch, dim, seqlen),
    conv_state (batch, dim, state_len), written in place.

    Raises:
        NotImplementedError: an activation that is not None, "silu" or "swish".
        RuntimeError, ValueError: as :func:`dlops.functional.causal_conv1d_update`.
    """
    _check_activation(activation)
    return F.causal_conv1d_update(x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices)


def _check_activation(activation: str | None) -> None:
    if activation not in (None, "silu", "swish"):
        raise NotImplementedError(f"activation is {activation!r}, accepted are None, 'silu' and 'swish'")
