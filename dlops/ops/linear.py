"""Linear layers with what follows them fused: activation, gate (GLU variants), maximum over pieces (maxout).

Shazeer, "GLU Variants Improve Transformer", 2020; Goodfellow et al., "Maxout Networks", 2013.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dlops._op import acc, as_rows, context_dtype, op, sum_rows
from dlops.ops._check import FLOATING, check_shape, check_tensors
from dlops.ops._linear_backends import ONEDNN_LONGEST, implement, onednn_wins, reads_well
from dlops.ops.activation import FROM_NOTHING, FROM_OUTPUT, activate, activate_backward, check_activation

# torch runs linear in the dtype that the autocast context asks for.
AUTOCAST = {"cuda": context_dtype, "cpu": context_dtype}


def _check_weight(op_name: str, name: str, x: Tensor, weight: Tensor) -> None:
    if weight.dim() != 2:
        raise RuntimeError(
            f"{op_name}: {name} has shape {tuple(weight.shape)}, accepted is 2-d, (out_features, in_features)"
        )
    if weight.shape[1] != x.shape[-1]:
        raise RuntimeError(
            f"{op_name}: {name} has shape {tuple(weight.shape)}, accepted is (out_features, {x.shape[-1]}) "
            f"for x of shape {tuple(x.shape)}"
        )


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the checks below would pass, at a third of their cost."""
    dtype, device = x.dtype, x.get_device()
    if dtype not in FLOATING or weight.dtype != dtype or weight.dim() != 2 or x.dim() == 0:
        return False
    if weight.size(1) != x.size(-1) or weight.get_device() != device or weight.is_cpu != x.is_cpu:
        return False
    if bias is None:
        return True
    if bias.dtype != dtype or bias.dim() != 1 or bias.size(0) != weight.size(0):
        return False
    return bias.get_device() == device and bias.is_cpu == x.is_cpu


def _check_linear_act(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, params: list[float], save: bool
) -> None:
    if not _fits(x, weight, bias):
        check_tensors("linear_act", x, weight=weight, bias=bias)
        _check_weight("linear_act", "weight", x, weight)
        check_shape("linear_act", "bias", bias, weight.shape[:1])
    check_activation("linear_act", activation, params)


def _check_gated_linear(
    x: Tensor,
    weight_gate: Tensor,
    weight_up: Tensor,
    bias_gate: Tensor | None,
    bias_up: Tensor | None,
    activation: str,
    params: list[float],
    save: bool,
) -> None:
    check_tensors("gated_linear", x, weight_gate=weight_gate, weight_up=weight_up, bias_gate=bias_gate, bias_up=bias_up)
    _check_weight("gated_linear", "weight_gate", x, weight_gate)
    check_shape("gated_linear", "weight_up", weight_up, weight_gate.shape)
    check_shape("gated_linear", "bias_gate", bias_gate, weight_gate.shape[:1])
    check_shape("gated_linear", "bias_up", bias_up, weight_gate.shape[:1])
    check_activation("gated_linear", activation, params)


def _check_maxout_linear(x: Tensor, weight: Tensor, bias: Tensor | None, num_pieces: int) -> None:
    check_tensors("maxout_linear", x, weight=weight, bias=bias)
    _check_weight("maxout_linear", "weight", x, weight)
    check_shape("maxout_linear", "bias", bias, weight.shape[:1])
    if not hasattr(num_pieces, "__index__"):
        raise TypeError(f"maxout_linear: num_pieces is {num_pieces!r}, accepted is an int")
    if num_pieces < 1 or weight.shape[0] % num_pieces:
        raise ValueError(
            f"maxout_linear: num_pieces is {num_pieces}, accepted are divisors of weight's {weight.shape[0]} rows"
        )


# ---- definitions ---------------------------------------------------------------------------------------------------


@op(returns=("y", "pre"), check=_check_linear_act, autocast=AUTOCAST)
def linear_act(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, params: list[float], save: bool
) -> tuple[Tensor, Tensor]:
    """y = activation(x weight^T + bias); with ``save`` also the pre-activation."""
    pre = F.linear(x, weight, bias).contiguous()
    y = activate(pre, activation, params)
    return y.clone() if y is pre and save else y, pre if save else x.new_empty(0)


@op(returns=("dx", "dweight", "dbias"))
def linear_act_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    saved: Tensor,
    activation: str,
    params: list[float],
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`linear_act`; ``saved`` is y for the activations of ``FROM_OUTPUT``, else pre."""
    dpre = activate_backward(dy, saved, activation, params)
    dbias = sum_rows(acc(dpre)).to(x.dtype) if output_mask[2] else x.new_empty(0)
    return *_products(dpre, x, weight, output_mask), dbias


@op(returns=("y", "gate", "up"), check=_check_gated_linear, autocast=AUTOCAST)
def gated_linear(
    x: Tensor,
    weight_gate: Tensor,
    weight_up: Tensor,
    bias_gate: Tensor | None,
    bias_up: Tensor | None,
    activation: str,
    params: list[float],
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y = activation(x weight_gate^T + bias_gate) * (x weight_up^T + bias_up); with ``save`` also both products."""
    gate = F.linear(x, weight_gate, bias_gate).contiguous()
    up = F.linear(x, weight_up, bias_up).contiguous()
    y = activate(gate, activation, params) * up
    return y, gate if save else x.new_empty(0), up if save else x.new_empty(0)


@op(returns=("dx", "dweight_gate", "dweight_up", "dbias_gate", "dbias_up"))
def gated_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight_gate: Tensor,
    weight_up: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str,
    params: list[float],
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`gated_linear` from its two products."""
    act = activate(gate, activation, params)
    saved = act if activation in FROM_OUTPUT else gate
    dgate, dup = activate_backward(dy * up, saved, activation, params), dy * act
    dx_gate, dweight_gate = _products(dgate, x, weight_gate, output_mask)
    dx_up, dweight_up = _products(dup, x, weight_up, [output_mask[0], output_mask[2]])
    dbias_gate = sum_rows(acc(dgate)).to(x.dtype) if output_mask[3] else x.new_empty(0)
    dbias_up = sum_rows(acc(dup)).to(x.dtype) if output_mask[4] else x.new_empty(0)
    return dx_gate + dx_up, dweight_gate, dweight_up, dbias_gate, dbias_up


@op(returns=("y", "index"), check=_check_maxout_linear, autocast=AUTOCAST)
def maxout_linear(x: Tensor, weight: Tensor, bias: Tensor | None, num_pieces: int) -> tuple[Tensor, Tensor]:
    """y[n] = max over j of (x weight^T + bias)[n * num_pieces + j]; index is that j."""
    pieces = F.linear(x, weight, bias).unflatten(-1, (weight.shape[0] // num_pieces, num_pieces))
    y, index = pieces.max(-1)
    return y.contiguous(), index.contiguous()


@op(returns=("dx", "dweight", "dbias"))
def maxout_linear_backward(
    dy: Tensor, x: Tensor, weight: Tensor, index: Tensor, num_pieces: int, output_mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`maxout_linear`; they flow through the piece that won."""
    dpre = dy.new_zeros((*dy.shape, num_pieces)).scatter(-1, index[..., None], dy[..., None])
    dpre = dpre.reshape(*dy.shape[:-1], weight.shape[0])
    dbias = sum_rows(acc(dpre)).to(x.dtype) if output_mask[2] else x.new_empty(0)
    return *_products(dpre, x, weight, output_mask), dbias


def _products(dpre: Tensor, x: Tensor, weight: Tensor, output_mask: list[bool]) -> tuple[Tensor, Tensor]:
    """dx = dpre weight and dweight = dpre^T x, those that are asked for."""
    dx = torch.matmul(dpre, weight).contiguous() if output_mask[0] else x.new_empty(0)
    dweight = (as_rows(dpre).t() @ as_rows(x)).contiguous() if output_mask[1] else x.new_empty(0)
    return dx, dweight


# ---- gradients -----------------------------------------------------------------------------------------------------


def _linear_act_formula(
    grads: Sequence[Any], args: Sequence[Any], extras: Sequence[Tensor], mask: list[bool]
) -> Sequence[Tensor | None]:
    x, weight, bias, activation, params, save = args
    if activation in FROM_NOTHING:
        saved = grads[0]
    elif save or activation in FROM_OUTPUT:
        saved = extras[0]
    else:
        saved = F.linear(x, weight, bias)
    return *linear_act_backward(grads[0], x, weight, saved, activation, params, mask[:3]), None, None, None


def _gated_linear_formula(
    grads: Sequence[Any], args: Sequence[Any], extras: Sequence[Tensor], mask: list[bool]
) -> Sequence[Tensor | None]:
    x, weight_gate, weight_up, bias_gate, bias_up, activation, params, save = args
    if save:
        gate, up = extras
    else:
        gate, up = F.linear(x, weight_gate, bias_gate), F.linear(x, weight_up, bias_up)
    gradients = gated_linear_backward(grads[0], x, weight_gate, weight_up, gate, up, activation, params, mask[:5])
    return *gradients, None, None, None


def _maxout_linear_formula(
    grads: Sequence[Any], args: Sequence[Any], extras: Sequence[Tensor], mask: list[bool]
) -> Sequence[Tensor | None]:
    x, weight, _, num_pieces = args
    return *maxout_linear_backward(grads[0], x, weight, extras[0], num_pieces, mask[:3]), None


def _linear_act_saves(args: Sequence[Any], outputs: Sequence[Tensor]) -> tuple[Sequence[Any], Sequence[Tensor]]:
    activation = args[3]
    if activation in FROM_NOTHING:
        return args, ()
    return args, outputs[:1] if activation in FROM_OUTPUT else outputs[1:]


linear_act.register_autograd(
    _linear_act_formula,
    saves=_linear_act_saves,
    non_differentiable=("pre",),
)
gated_linear.register_autograd(
    _gated_linear_formula,
    saves=lambda args, outputs: (args, outputs[1:]),
    non_differentiable=("gate", "up"),
)
maxout_linear.register_autograd(
    _maxout_linear_formula, saves=lambda args, outputs: (args, outputs[1:]), non_differentiable=("index",)
)


# ---- backends ------------------------------------------------------------------------------------------------------


def _rule(*args: Any) -> Sequence[str]:
    x = args[0]
    if not x.is_cpu:
        return ("vendor", "cuda", "triton", "torch")  # unmeasured
    # cpu: bench rows linear_act and gated_linear. Where oneDNN's products beat MKL's, so does its fused call, which
    # takes no long sums and cannot keep the pre-activation (`save`, the last argument).
    fused = args[-1] is False and x.shape[-1] <= ONEDNN_LONGEST and onednn_wins(x) and reads_well(x)
    return ("vendor", "cpu", "torch") if fused else ("cpu", "torch")


for _op in (
    linear_act,
    linear_act_backward,
    gated_linear,
    gated_linear_backward,
    maxout_linear,
    maxout_linear_backward,
):
    _op.rule = _rule
    _op.implement("triton")
    implement(_op)
