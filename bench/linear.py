"""Linear layers with an activation, a gate or a maximum. Letters: M rows, K in, N out, P pieces."""

from collections.abc import Sequence
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

import dlops.functional as D
from bench.case import Problem, case, importable

LABEL = "{}x{}->{}"
SHAPES: dict[str, Any] = {
    "cpu": [(512, 1024, 4096)],
    "cuda": [(4096, 4096, 4096), (8192, 8192, 8192), (16, 8192, 8192)],
    "more_cpu": [(3520, 384, 1536), (128, 768, 3072), (16, 1024, 4096), (1, 4096, 4096)],
    "more_cuda": [(1, 8192, 8192), (256, 4096, 4096), (8192, 1024, 4096), (4096, 4096, 14336), (4095, 4097, 1000)],
    "small": (8, 64, 64),
    "label": LABEL,
}
GATED: dict[str, Any] = {
    "cpu": [(512, 768, 2048)],
    "cuda": [(4096, 4096, 14336), (16, 4096, 14336)],
    "more_cpu": [(128, 1024, 2816), (1, 4096, 11008)],
    "more_cuda": [(8192, 8192, 8192), (1, 4096, 14336)],
    "small": (8, 64, 64),
    "label": LABEL,
}
MAXOUT: dict[str, Any] = {
    "cpu": [(512, 768, 1024, 2)],
    "cuda": [(4096, 4096, 4096, 2)],
    "more_cpu": [(512, 768, 512, 4)],
    "more_cuda": [(4096, 4096, 1024, 5), (16, 4096, 4096, 2)],
    "small": (8, 64, 32, 2),
    "label": "{}x{}->{}, {} pieces",
}
ACTIVATIONS = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "sigmoid": F.sigmoid,
    "tanh": F.tanh,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu2": lambda x: F.relu(x).square(),
    "hardswish": F.hardswish,
    "mish": F.mish,
    "softplus": F.softplus,
}
GATES = ("silu", "gelu", "relu", "sigmoid")
REPRESENTATIVE = ("gelu",)
REPRESENTATIVE_GATES = ("silu",)


def _inputs(device: torch.device, dtype: torch.dtype, m: int, k: int, rows: Sequence[int]) -> tuple[Tensor, ...]:
    """x (M, K) and weights (rows, K), scaled so that products are of order one."""
    x = torch.randn(m, k, device=device, dtype=dtype)
    return x, *(torch.randn(n, k, device=device, dtype=dtype) / k**0.5 for n in rows)


class Cost(TypedDict):
    bytes: tuple[float, float]
    flops: tuple[float, float]


def _cost(m: int, k: int, n: int, outputs: int, itemsize: int) -> Cost:
    """Forward reads x and weight (N, K) and writes y; backward reads dy, x and weight and writes two gradients."""
    inputs = (m * k + k * n) * itemsize
    y = m * outputs * itemsize
    return {"bytes": (inputs + y, 3 * inputs + 2 * y), "flops": (2.0 * m * k * n, 6.0 * m * k * n)}


@case(more_cpu=SHAPES["cpu"], more_cuda=SHAPES["cuda"], small=SHAPES["small"], label=LABEL)
def linear(device: torch.device, dtype: torch.dtype, m: int, k: int, n: int) -> Problem:
    args = (*_inputs(device, dtype, m, k, [n]), torch.randn(n, device=device, dtype=dtype))
    return Problem(dlops=D.linear, eager=F.linear, args=args, **_cost(m, k, n, n, dtype.itemsize))


def _linear_act(activation: str) -> None:
    act = ACTIVATIONS[activation]

    def build(device: torch.device, dtype: torch.dtype, m: int, k: int, n: int) -> Problem:
        return Problem(
            dlops=lambda x, w, b: D.linear_act(x, w, b, activation),
            eager=lambda x, w, b: act(F.linear(x, w, b)),
            args=(*_inputs(device, dtype, m, k, [n]), torch.randn(n, device=device, dtype=dtype)),
            peers={"bare matmul": lambda x, w, b: F.linear(x, w)},
            **_cost(m, k, n, n, dtype.itemsize),
        )

    case(name=f"linear_{activation}", **_only_all(SHAPES, activation in REPRESENTATIVE))(build)


def _gated_linear(activation: str) -> None:
    act = ACTIVATIONS[activation]

    def build(device: torch.device, dtype: torch.dtype, m: int, k: int, n: int) -> Problem:
        liger = importable("liger_kernel.ops.swiglu:LigerSiLUMulFunction") if activation == "silu" else None
        peers = {"liger": lambda x, gate, up: liger.apply(F.linear(x, gate), F.linear(x, up))} if liger else {}
        return Problem(
            dlops=lambda x, gate, up: D.gated_linear(x, gate, up, activation=activation),
            eager=lambda x, gate, up: act(F.linear(x, gate)) * F.linear(x, up),
            args=_inputs(device, dtype, m, k, [n, n]),
            peers=peers if device.type == "cuda" else {},
            **_cost(m, k, 2 * n, n, dtype.itemsize),
        )

    case(name=f"gated_linear_{activation}", **_only_all(GATED, activation in REPRESENTATIVE_GATES))(build)


def _only_all(shapes: dict[str, Any], representative: bool) -> dict[str, Any]:
    """``shapes``, or those of a case that only ``--all`` measures: the representative ones, no small one."""
    if representative:
        return shapes
    return {"more_cpu": shapes["cpu"], "more_cuda": shapes["cuda"], "label": shapes["label"]}


for _activation in ACTIVATIONS:
    _linear_act(_activation)
for _activation in GATES:
    _gated_linear(_activation)


@case(**MAXOUT)
def maxout_linear(device: torch.device, dtype: torch.dtype, m: int, k: int, n: int, pieces: int) -> Problem:
    return Problem(
        dlops=lambda x, w, b: D.maxout_linear(x, w, b, pieces),
        eager=lambda x, w, b: F.linear(x, w, b).unflatten(-1, (n, pieces)).max(-1).values,
        args=(*_inputs(device, dtype, m, k, [n * pieces]), torch.randn(n * pieces, device=device, dtype=dtype)),
        **_cost(m, k, n * pieces, n, dtype.itemsize),
    )
