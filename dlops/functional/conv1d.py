"""Causal depthwise convolution over time."""

from torch import Tensor

from dlops._op import acc
from dlops.functional._packed import check_cu_seqlens
from dlops.ops.conv1d import causal_conv1d as causal_conv1d_op

ACTIVATIONS = {None: "none", "none": "none", "silu": "silu", "swish": "silu"}


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dilation: int = 1,
) -> Tensor | tuple[Tensor, Tensor]:
    """Each channel's own filter over the steps up to the present one, with the activation:

        y[t] = activation(bias + sum over k of weight[k] x[t - (width - 1 - k) dilation])

    The convolution before the scan of Mamba (Gu and Dao, 2023); ``F.conv1d`` with ``groups=dim`` and padding on the
    left, and with states to go on from. It computes in float32 (float64 with float64); autocast casts nothing.

    Args:
        x: (batch, dim, seqlen), float32, bfloat16, float16 or float64, in any strides; a transposed
            (batch, seqlen, dim) is as good.
        weight: (dim, width), any width, in x's dtype or float32.
        bias: (dim,) in x's dtype or float32, or None.
        activation: None, "silu" or "swish", its other name.
        initial_states: (batch, dim, (width - 1) * dilation) in x's dtype: the steps before the first; None for zeros.
        return_final_states: return also the last (width - 1) * dilation steps, initial states included: the initial
            states of what follows.
        seq_idx: (batch, seqlen) int32: a step sees only steps of the same index; of a negative one (padding) y is zero.
            The initial states belong to the first step's sequence, the final states to the last step's.
        cu_seqlens: (num_sequences + 1,) int32, from 0 to seqlen: sequence i is the steps from cu_seqlens[i] to
            cu_seqlens[i + 1] of the one batch element. The states are then (num_sequences, dim, ...).
        dilation: steps between the filter's taps.

    Returns:
        y, shaped like x, in its dtype and, if it is channels-last, its layout; or ``(y, final_states)``.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit together.
        ValueError: an unknown activation, a dilation < 1, seq_idx together with cu_seqlens, cu_seqlens that does not go
            from 0 to seqlen, or decreases.
    """
    if cu_seqlens is not None:
        check_cu_seqlens("causal_conv1d", cu_seqlens, x, 2)
    if activation not in ACTIVATIONS:
        raise ValueError(f"causal_conv1d: activation is {activation!r}, accepted are None, 'silu' and 'swish'")
    if bias is not None and bias.dtype != weight.dtype:
        weight, bias = acc(weight), acc(bias)
    y, final_states = causal_conv1d_op(
        x,
        weight,
        bias,
        initial_states,
        seq_idx,
        cu_seqlens,
        ACTIVATIONS[activation],
        dilation,
        return_final_states,
    )
    return (y, final_states) if return_final_states else y
