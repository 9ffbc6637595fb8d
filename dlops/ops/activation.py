"""The activations of the linear family: values and derivatives, under one set of names, in plain PyTorch."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten

# name: (value(x, *params), derivative(dy, saved, *params)); the parameters are torch's, in PARAMETERS' order.
_TABLE: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "none": (lambda x: x, lambda dy, y: dy),
    # step's masks, unlike a comparison alone, keep autograd's graph, as sign does: the gradient is zero, not none.
    "step": (lambda x: x.masked_fill(x >= 0, 1).masked_fill(~(x >= 0), 0), lambda dy, y: torch.zeros_like(dy)),
    "sign": (torch.sign, lambda dy, y: torch.zeros_like(dy)),
    "relu": (F.relu, lambda dy, y: aten.threshold_backward(dy, y, 0)),
    "leaky_relu": (F.leaky_relu, lambda dy, x, slope: aten.leaky_relu_backward(dy, x, slope, False)),
    "elu": (F.elu, lambda dy, x, alpha: aten.elu_backward(dy, alpha, 1, 1, False, x)),
    "sigmoid": (torch.sigmoid, aten.sigmoid_backward),
    "tanh": (torch.tanh, aten.tanh_backward),
    "gelu": (F.gelu, aten.gelu_backward),
    "gelu_tanh": (
        lambda x: F.gelu(x, approximate="tanh"),
        lambda dy, x: aten.gelu_backward(dy, x, approximate="tanh"),
    ),
    "silu": (F.silu, aten.silu_backward),
    "relu2": (lambda x: F.relu(x).square(), lambda dy, x: dy * (2 * F.relu(x))),
    "hardswish": (F.hardswish, aten.hardswish_backward),
    "mish": (F.mish, aten.mish_backward),
    "softplus": (F.softplus, aten.softplus_backward),
}

ACTIVATIONS = tuple(_TABLE)
PARAMETERS: Mapping[str, Mapping[str, float]] = {
    "leaky_relu": {"negative_slope": 0.01},
    "elu": {"alpha": 1.0},
    "softplus": {"beta": 1.0, "threshold": 20.0},
}
_DEFAULTS = {name: list(PARAMETERS.get(name, {}).values()) for name in _TABLE}
# Activations whose derivative is a function of their output: the backward keeps y, not the pre-activation.
FROM_OUTPUT = frozenset({"none", "step", "sign", "relu", "sigmoid", "tanh"})
# Those of them whose derivative is a constant: the backward keeps nothing, and any tensor of y's shape serves as y.
FROM_NOTHING = frozenset({"none", "step", "sign"})


def activate(x: Tensor, activation: str, params: list[float]) -> Tensor:
    """``activation`` of ``x``, elementwise."""
    return _TABLE[activation][0](x, *params)


def activate_backward(dy: Tensor, saved: Tensor, activation: str, params: list[float]) -> Tensor:
    """``dy`` times the derivative, at ``saved``: the output for :data:`FROM_OUTPUT`, else the input."""
    return _TABLE[activation][1](dy, saved, *params)


def check_activation(op: str, activation: str, params: list[float]) -> None:
    """Raise ValueError for an unknown activation, or for the wrong number of parameters."""
    accepted = _accepted(op, activation)
    if len(params) != len(accepted):
        raise ValueError(f"{op}: {activation} takes {len(accepted)} parameters {tuple(accepted)}, got {params}")


def activation_params(op: str, activation: str, given: Mapping[str, float]) -> list[float]:
    """The parameters of ``activation`` in the ops' order, from keywords by torch's names.

    Raises:
        ValueError: an unknown activation.
        TypeError: a keyword that this activation does not take, or a value of another type.
    """
    if not given and isinstance(activation, str) and activation in _DEFAULTS:
        return _DEFAULTS[activation]
    accepted = _accepted(op, activation)
    for name, value in given.items():
        if name not in accepted:
            takes = f"takes {', '.join(accepted)}" if accepted else "takes no parameters"
            raise TypeError(f"{op}: got an unexpected keyword argument {name!r}; activation {activation!r} {takes}")
        if not hasattr(value, "__float__"):
            raise TypeError(f"{op}: {name} is {value!r}, accepted is a number")
    return [float(given.get(name, default)) for name, default in accepted.items()]


def _accepted(op: str, activation: str) -> Mapping[str, float]:
    if not isinstance(activation, str):
        raise TypeError(f"{op}: activation is {activation!r}, accepted is a str")
    if activation not in _TABLE:
        raise ValueError(f"{op}: activation is {activation!r}, accepted are {', '.join(ACTIVATIONS)}")
    return PARAMETERS.get(activation, {})
