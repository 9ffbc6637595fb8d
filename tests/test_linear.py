"""The linear family: samples for the contract, torch as the reference, bad input."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import dlops
import dlops.functional as F
from dlops.ops import linear
from dlops.ops.activation import ACTIVATIONS, FROM_OUTPUT, activate, activation_params
from dlops.testing import Make, samples

# x's leading shape, out_features, in_features: odd sizes, tile edges +-1, one element, empty; LONG: a long reduction.
SHAPES = [
    ((), 3, 5),
    ((1,), 1, 1),
    ((3,), 7, 5),
    ((0,), 4, 6),
    ((5,), 4, 0),
    ((3,), 0, 4),
    ((15,), 17, 33),
    ((2, 3), 31, 64),
    ((2, 1, 2, 1), 5, 9),
]
LONG = ((9,), 24, 8200)
OPTIONS = {"leaky_relu": [0.2], "elu": [0.7], "softplus": [1.5, 3.0]}


def _activations() -> Iterator[tuple[str, list[float]]]:
    for activation in ACTIVATIONS:
        yield activation, activation_params("linear_act", activation, {})
        if activation in OPTIONS:
            yield activation, OPTIONS[activation]


@samples(linear.linear_act, degree=6)
def linear_act_samples(make: Make) -> Iterator[tuple[Any, ...]]:
    for activation, params in _activations():
        yield make(5, 6), make(9, 6), make(9), activation, params, activation not in FROM_OUTPUT
    for lead, n, k in SHAPES:
        yield make(*lead, k), make(n, k), make(n), "gelu", [], True
        yield make(*lead, k), make(n, k), None, "relu", [], False
    lead, n, k = LONG
    yield make(*lead, k), make(n, k), None, "silu", [], True
    yield make(3, 4), make(5, 4), None, "silu", [], False


@samples(linear.gated_linear, degree=8)
def gated_linear_samples(make: Make) -> Iterator[tuple[Any, ...]]:
    for activation, params in _activations():
        yield make(5, 6), make(9, 6), make(9, 6), make(9), make(9), activation, params, True
    for lead, n, k in SHAPES:
        yield make(*lead, k), make(n, k), make(n, k), None, None, "silu", [], True
    yield make(3, 4), make(5, 4), make(5, 4), make(5), None, "gelu", [], False
    yield make(3, 4), make(5, 4), make(5, 4), None, make(5), "gelu", [], False


@samples(linear.maxout_linear, degree=4)
def maxout_linear_samples(make: Make) -> Iterator[tuple[Any, ...]]:
    for lead, n, k in SHAPES:
        yield make(*lead, k), make(3 * n, k), make(3 * n), 3
    yield make(4, 6), make(10, 6), None, 1
    yield make(4, 6), make(10, 6), None, 5


@samples(linear.linear_act_backward, degree=6)
def linear_act_backward_samples(make: Make) -> Iterator[tuple[Any, ...]]:
    for x, weight, bias, activation, params, _ in linear_act_samples(make):
        y, pre = linear.linear_act.definition(x, weight, bias, activation, params, True)
        saved = y if activation in FROM_OUTPUT else pre
        yield make(*y.shape), x, weight, saved, activation, params, [True, True, bias is not None]
    for mask in ([True, False, False], [False, True, False], [False, False, True]):
        yield make(3, 5), make(3, 4), make(5, 4), make(3, 5), "gelu", [], mask


@samples(linear.gated_linear_backward, degree=8)
def gated_linear_backward_samples(make: Make) -> Iterator[tuple[Any, ...]]:
    for x, weight_gate, weight_up, bias_gate, bias_up, activation, params, _ in gated_linear_samples(make):
        _, gate, up = linear.gated_linear.definition(
            x, weight_gate, weight_up, bias_gate, bias_up, activation, params, True
        )
        mask = [True, True, True, bias_gate is not None, bias_up is not None]
        yield make(*gate.shape), x, weight_gate, weight_up, gate, up, activation, params, mask
    for i in range(5):
        mask = [j == i for j in range(5)]
        yield make(3, 5), make(3, 4), make(5, 4), make(5, 4), make(3, 5), make(3, 5), "silu", [], mask


@samples(linear.maxout_linear_backward, degree=4)
def maxout_linear_backward_samples(make: Make) -> Iterator[tuple[Any, ...]]:
    for x, weight, bias, num_pieces in maxout_linear_samples(make):
        y, index = linear.maxout_linear.definition(x, weight, bias, num_pieces)
        yield make(*y.shape), x, weight, index, num_pieces, [True, True, bias is not None]


@pytest.mark.parametrize("size", [3, 600])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equal_to_the_composition(activation: str, size: int) -> None:
    x, weight, bias = torch.randn(size, 64), torch.randn(70, 64), torch.randn(70)
    params = activation_params("linear_act", activation, {})
    pre = torch.nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(F.linear_act(x, weight, bias, activation), activate(pre, activation, params))
    up = torch.nn.functional.linear(x, weight - 1)
    torch.testing.assert_close(
        F.gated_linear(x, weight, weight - 1, bias, None, activation), activate(pre, activation, params) * up
    )
    torch.testing.assert_close(F.maxout_linear(x, weight, bias, 7), pre.unflatten(-1, (10, 7)).amax(-1))


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_linear_is_torch_linear(precision: str) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            x, weight = torch.randn(3, 300, 64, dtype=dtype), torch.randn(70, 64, dtype=dtype)
            torch.testing.assert_close(F.linear(x, weight), torch.nn.functional.linear(x, weight))
    finally:
        torch.set_float32_matmul_precision(before)


def test_modules() -> None:
    x = torch.randn(4, 6)
    linear = torch.nn.Linear(6, 8)
    ours = dlops.nn.Linear(6, 8)
    ours.load_state_dict(linear.state_dict())
    torch.testing.assert_close(ours(x), linear(x))
    act = dlops.nn.LinearAct(6, 8, activation="elu", alpha=0.5)
    act.load_state_dict(linear.state_dict())
    torch.testing.assert_close(act(x), torch.nn.functional.elu(linear(x), alpha=0.5))
    maxout = dlops.nn.Maxout(6, 4, num_pieces=2)
    maxout.load_state_dict(linear.state_dict())
    torch.testing.assert_close(maxout(x), linear(x).view(4, 4, 2).amax(-1))
    gated = dlops.nn.GatedLinear(6, 8, bias=True)
    assert {k: tuple(v.shape) for k, v in gated.state_dict().items()} == {
        "weight_gate": (8, 6),
        "weight_up": (8, 6),
        "bias_gate": (8,),
        "bias_up": (8,),
    }
    product = torch.nn.functional.silu(x @ gated.weight_gate.T + gated.bias_gate) * (
        x @ gated.weight_up.T + gated.bias_up
    )
    torch.testing.assert_close(gated(x), product)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda x, w: F.linear_act(x, w[:, :3]),
            RuntimeError,
            r"weight has shape \(5, 3\), accepted is \(out_features, 4\)",
        ),
        (lambda x, w: F.linear_act(x, w, w[:3, 0]), RuntimeError, r"bias has shape \(3,\), accepted is \(5,\)"),
        (lambda x, w: F.linear_act(x.long(), w.long()), RuntimeError, "x has dtype torch.int64"),
        (lambda x, w: F.linear_act(x + 0j, w + 0j), RuntimeError, "x has dtype torch.complex64"),
        (lambda x, w: F.linear_act(x, w.double()), RuntimeError, "weight has dtype torch.float64"),
        (lambda x, w: F.linear_act(x, w.to("meta")), RuntimeError, "weight is on meta"),
        (
            lambda x, w: F.linear_act(x, w, activation="swish"),
            ValueError,
            "'swish', accepted are none, step, sign, relu",
        ),
        (lambda x, w: F.linear_act(x, w, activation="relu", alpha=1.0), TypeError, "alpha.*takes no parameters"),
        (lambda x, w: F.linear_act(x, w, activation="elu", beta=1.0), TypeError, "beta.*takes alpha"),
        (lambda x, w: F.linear_act(x[0, 0], w), RuntimeError, "0-dimensional"),
        (lambda x, w: F.linear_act(x, w[0]), RuntimeError, "accepted is 2-d"),
        (lambda x, w: F.linear_act(x, w[None]), RuntimeError, "accepted is 2-d"),
        (lambda x, w: F.linear_act(x, w[0, 0]), RuntimeError, "accepted is 2-d"),
        (lambda x, w: F.gated_linear(x, w, w[:4]), RuntimeError, r"weight_up has shape \(4, 4\), accepted is \(5, 4\)"),
        (lambda x, w: F.gated_linear(x, w, w, None, w[:4, 0]), RuntimeError, "bias_up has shape"),
        (lambda x, w: F.gated_linear(x, w, w, activation="swiglu"), ValueError, "accepted are none, step"),
        (lambda x, w: F.maxout_linear(x, w, None, 2), ValueError, "num_pieces is 2, accepted are divisors"),
        (lambda x, w: F.maxout_linear(x, w, None, 0), ValueError, "num_pieces is 0"),
        (lambda x, w: dlops.nn.LinearAct(3, 4, activation="swish"), ValueError, "accepted are none"),
        (lambda x, w: dlops.use_backend("cudnn").__enter__(), ValueError, "'cudnn', accepted are 'torch'"),
    ],
)
@pytest.mark.parametrize("name", [None, "torch", "cpu", "cuda", "triton"])
def test_bad_input(name: str | None, call: Any, error: type[Exception], message: str) -> None:
    with dlops.use_backend(name), pytest.raises(error, match=message):
        call(torch.randn(2, 4), torch.randn(5, 4))


def test_a_forced_backend_that_cannot_run_says_why() -> None:
    with dlops.use_backend("triton"), pytest.raises(RuntimeError, match="triton.*float64"):
        F.linear_act(torch.randn(2, 4).double(), torch.randn(5, 4).double())
    with dlops.use_backend("vendor"), pytest.raises(RuntimeError, match="maxout_linear has no vendor implementation"):
        F.maxout_linear(torch.randn(2, 4), torch.randn(4, 4))
