"""The linear family: samples for the contract, torch as the reference, bad input."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import dlops
import dlops.functional as F
from dlops import backend
from dlops.ops import _linear_backends, linear
from dlops.ops.activation import ACTIVATIONS, FROM_OUTPUT, activate, activate_backward, activation_params
from dlops.testing import DTYPES, RATIO, Make, check_ratios, error_ratio, layouts, samples

# x's leading shape, out_features, in_features: odd sizes, tile edges +-1, one element, empty; LONG: a long
# reduction, which kernels split, and more outputs than a block of the smallest tile has.
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
LONG = ((9,), 33, 8200)
LONG_KINDS = ("normal", "mean100")  # the others change no sum's rounding, and the interpreter takes 10 s for each
# Rows and columns of gradients: several tiles of both in each program; more columns than a block has. Without dx, which
# is a library's product alone.
MANY = [(67, 520), (18, 2104)]
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
    if make.kind in LONG_KINDS:
        lead, n, k = LONG
        yield make(*lead, k), make(n, k), None, "silu", [], True
    yield make(3, 4), make(5, 4), None, "silu", [], False


@samples(linear.gated_linear, degree=8)
def gated_linear_samples(make: Make) -> Iterator[tuple[Any, ...]]:
    for activation, params in _activations():
        yield make(5, 6), make(9, 6), make(9, 6), make(9), make(9), activation, params, True
    for lead, n, k in SHAPES:
        yield make(*lead, k), make(n, k), make(n, k), None, None, "silu", [], True
    if make.kind in LONG_KINDS:
        lead, _, k = LONG
        yield make(*lead, k), make(16, k), make(16, k), make(16), make(16), "gelu", [], True
    yield make(3, 4), make(5, 4), make(5, 4), make(5), None, "gelu", [], False
    yield make(3, 4), make(5, 4), make(5, 4), None, make(5), "gelu", [], False


@samples(linear.maxout_linear, degree=4)
def maxout_linear_samples(make: Make) -> Iterator[tuple[Any, ...]]:
    for lead, n, k in SHAPES:
        yield make(*lead, k), make(3 * n, k), make(3 * n), 3
    for num_pieces in (1, 2, 4, 5):
        yield make(4, 6), make(20, 6), None, num_pieces
    if make.kind in LONG_KINDS:
        lead, _, k = LONG
        yield make(*lead, k), make(32, k), make(32), 2


@samples(linear.linear_act_backward, degree=6)
def linear_act_backward_samples(make: Make) -> Iterator[tuple[Any, ...]]:
    for x, weight, bias, activation, params, _ in linear_act_samples(make):
        y, pre = linear.linear_act.definition(x, weight, bias, activation, params, True)
        saved = y if activation in FROM_OUTPUT else pre
        yield make(*y.shape), x, weight, saved, activation, params, [True, True, bias is not None]
    for mask in ([True, False, False], [False, True, False], [False, False, True]):
        yield make(3, 5), make(3, 4), make(5, 4), make(3, 5), "gelu", [], mask
    for m, n in MANY:
        yield make(m, n), make(m, 2), make(n, 2), make(m, n), "gelu", [], [False, True, True]


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
    for m, n in MANY:
        gate, up = make(m, n), make(m, n)
        yield make(m, n), make(m, 2), make(n, 2), make(n, 2), gate, up, "silu", [], [False] + [True] * 4


@samples(linear.maxout_linear_backward, degree=4)
def maxout_linear_backward_samples(make: Make) -> Iterator[tuple[Any, ...]]:
    for x, weight, bias, num_pieces in maxout_linear_samples(make):
        y, index = linear.maxout_linear.definition(x, weight, bias, num_pieces)
        yield make(*y.shape), x, weight, index, num_pieces, [True, True, bias is not None]
    for num_pieces in (2, 3):
        index = torch.arange(5 * 140, device=make.device).view(5, 140) % num_pieces
        yield make(5, 140), make(5, 2), make(140 * num_pieces, 2), index, num_pieces, [False, True, True]


def cpu_passes(x: Tensor, up: Tensor, dy: Tensor, activation: str) -> list[Tensor]:
    ops = torch.ops.dlops_cpu
    grads = ops.gate_backward(dy, x, up, activation, [], False)[:2]
    return [ops.act(x, activation, []), ops.gate(x, up, activation, []), *grads]


def passes(x: Tensor, up: Tensor, dy: Tensor, activation: str) -> list[Tensor]:
    y = activate(x, activation, [])
    return [y, y * up, activate_backward(dy * up, x, activation, []), dy * y]


@pytest.mark.skipif(backend.missing("cpu") is not None, reason="dlops._C is not built")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_passes_of_the_cpu(dtype: torch.dtype) -> None:
    """In every dtype, although products of halves may come in float32, and of rows that are not adjacent."""
    given = [torch.randn(40, 1500 + gap).to(dtype)[:, :1500] for gap in (0, 3, 5)]
    double = [t.double() for t in given]
    for activation in ("gelu", "gelu_tanh"):
        results = [cpu_passes(*given, activation), passes(*given, activation), passes(*double, activation)]
        for y, yd, y64 in zip(*results, strict=True):
            assert max(error_ratio(y, yd, y64)) <= RATIO


@pytest.mark.skipif(backend.missing("cpu") is not None, reason="dlops._C is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_passes_too_large_for_the_caches(dtype: torch.dtype) -> None:
    """The CPU's kernels write them past the caches, which only aligned rows allow: the same rows over and over."""
    rows = [torch.randn(525, 2051 + gap).to(dtype) for gap in (1, 3, 5)]
    large = cpu_passes(*[x.repeat(8, 1)[:, :2051] for x in rows], "silu")
    for many, few in zip(large, cpu_passes(*[x[:, :2051] for x in rows], "silu"), strict=True):
        assert torch.equal(many.view(8, *few.shape), few.expand(8, *few.shape))


@pytest.mark.skipif(backend.missing("cpu") is not None, reason="dlops._C is not built")
def test_gradients_of_more_rows_than_one_run_sums() -> None:
    make = Make()
    args = [make(4200, 9), make(4200, 2), make(9, 2), make(4200, 9), "gelu", [], [True] * 3]
    check_ratios(linear.linear_act_backward, [args], "cpu")


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("rows", [(), (1,), (0,), (2, 65)])
@pytest.mark.parametrize("length", [1, 384, 385, 1100])
def test_products_where_onednn_wins(
    monkeypatch: pytest.MonkeyPatch, length: int, rows: tuple[int, ...], twice: bool
) -> None:
    monkeypatch.setattr(_linear_backends, "ONEDNN_WINS", True)
    monkeypatch.setattr(_linear_backends, "_ONEDNN_WINS_TWICE", twice)
    calls, onednn = [], _linear_backends._onednn
    monkeypatch.setattr(_linear_backends, "_onednn", lambda x, *others: calls.append(x) or onednn(x, *others))
    given = torch.randn(*rows, length), torch.randn(9, length), torch.randn(9)
    for args in [given, *layouts(given)]:
        exact = torch.nn.functional.linear(*(t.double() for t in args))
        calls.clear()
        y = _linear_backends.product(*args)
        assert max(error_ratio(y, torch.nn.functional.linear(*args), exact)) <= RATIO
        if args[0].is_contiguous():
            assert bool(calls) == (rows != (0,) and (length <= 384 or (twice and rows == (2, 65))))


@pytest.mark.parametrize("kind", ["nested", "jagged", "sparse", "csr weight"])
def test_linear_is_torch_linear_for_other_tensors(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(_linear_backends, "ONEDNN_WINS", True)
    x, weight = torch.randn(400, 96), torch.randn(64, 96)
    if kind in ("nested", "jagged"):
        layout = torch.strided if kind == "nested" else torch.jagged
        x = torch.nested.nested_tensor([x[:150], x[150:]], layout=layout)
    elif kind == "sparse":
        x = x.to_sparse()
    else:
        weight = weight.to_sparse_csr()
    y, yd = F.linear(x, weight), torch.nn.functional.linear(x, weight)
    for a, b in zip(y.unbind(), yd.unbind(), strict=True) if x.is_nested else [(y, yd)]:
        assert torch.equal(a, b)


@pytest.mark.parametrize("size", [3, 600])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equal_to_the_composition(activation: str, size: int) -> None:
    given = torch.randn(size, 64), torch.randn(70, 64), torch.randn(70)
    params = activation_params("linear_act", activation, {})

    def composed(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        pre = torch.nn.functional.linear(x, weight, bias)
        act = activate(pre, activation, params)
        up = torch.nn.functional.linear(x, weight - 1)
        return act, act * up, pre.unflatten(-1, (10, 7)).amax(-1)

    x, weight, bias = given
    ours = (
        F.linear_act(x, weight, bias, activation),
        F.gated_linear(x, weight, weight - 1, bias, None, activation),
        F.maxout_linear(x, weight, bias, 7),
    )
    for y, yd, y64 in zip(ours, composed(*given), composed(*(t.double() for t in given)), strict=True):
        assert max(error_ratio(y, yd, y64)) <= RATIO


@pytest.mark.parametrize("name", ["cpu", "triton", "cuda"])
def test_slopes_at_nan(name: str) -> None:
    """As in torch's vector code: in what is left over of a vector, its elu and hardswish have a slope of 1."""
    for activation, params in _activations():
        nan = torch.full((1, 64), torch.nan)
        args = (torch.ones(1, 64), torch.ones(1, 1), torch.ones(64, 1), nan, activation, params, [False, False, True])
        if reason := backend.refusal(linear.linear_act_backward, name, args):
            pytest.skip(reason)
        with dlops.use_backend(name):
            found = linear.linear_act_backward(*args)
        expected = linear.linear_act_backward.definition(*args)
        torch.testing.assert_close(found, expected, equal_nan=True, msg=lambda text, a=activation: f"{a}: {text}")


@pytest.mark.parametrize("name", ["cpu", "triton", "cuda"])
@pytest.mark.parametrize("activation", ["step", "sign", "relu", "hardswish"])
def test_an_infinite_gradient_ends_where_torch_selects_zero(activation: str, name: str) -> None:
    """Such as the gradient of sqrt(relu(x)) below zero."""
    pre = torch.tensor([-5.0, -4.0, 4.0, 5.0]).repeat(2, 16)
    dy = torch.tensor([torch.inf, torch.nan, 1.0, torch.inf]).repeat(2, 16)
    x, weight, saved = torch.ones(2, 1), torch.ones(64, 1), activate(pre, activation, [])
    call = (dy, x, weight, saved if activation in FROM_OUTPUT else pre, activation, [], [False, False, True])
    gated = (dy, x, weight, weight, pre, pre, activation, [], [False, False, False, True, True])
    for op, args in ((linear.linear_act_backward, call), (linear.gated_linear_backward, gated)):
        if reason := backend.refusal(op, name, args):
            pytest.skip(reason)
        with dlops.use_backend(name):
            found = op(*args)
        torch.testing.assert_close(found, op.definition(*args), equal_nan=True)


@pytest.mark.parametrize("name", ["torch", "cpu", "triton"])
def test_maxout_takes_the_first_of_equals_and_nan_before_all(name: str) -> None:
    x, weight, bias = torch.randn(5, 6), torch.randn(9, 6), torch.randn(9)
    bias[1] = float("nan")  # the second piece of the first output
    weight[5], bias[5], bias[3] = weight[4], bias[4], -100  # of the second, two equal pieces are the greatest
    if reason := backend.refusal(linear.maxout_linear, name, (x, weight, bias, 3)):
        pytest.skip(reason)
    y, index = linear.maxout_linear.definition(x, weight, bias, 3)
    assert y[:, 0].isnan().all() and (index[:, :2] == 1).all()
    with dlops.use_backend(name):
        found = linear.maxout_linear(x, weight, bias, 3)
    torch.testing.assert_close(found, (y, index), equal_nan=True)


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
        (lambda x, w: F.linear_act(x, None), TypeError, "weight is of type NoneType, accepted is a Tensor"),
        (lambda x, w: F.linear_act(x, [[1.0]]), TypeError, "weight is of type list, accepted is a Tensor"),
        (lambda x, w: F.linear_act(None, w), TypeError, "x is of type NoneType"),
        (lambda x, w: F.linear_act(x, w, 1.0), TypeError, "bias is of type float, accepted is a Tensor or None"),
        (
            lambda x, w: F.linear_act(x, w, activation=["gelu"]),
            TypeError,
            r"activation is \['gelu'\], accepted is a str",
        ),
        (lambda x, w: F.linear_act(x, w, activation="elu", alpha="1"), TypeError, "alpha is '1', accepted is a number"),
        (
            lambda x, w: F.linear_act(x, w, activation="elu", alpha=None),
            TypeError,
            "alpha is None, accepted is a number",
        ),
        (lambda x, w: F.gated_linear(x, w, None), TypeError, "weight_up is of type NoneType"),
        (lambda x, w: F.gated_linear(x, w, w, None, 1.0), TypeError, "bias_up is of type float"),
        (lambda x, w: F.gated_linear(x, w, w.to("meta")), RuntimeError, "weight_up is on meta"),
        (lambda x, w: F.gated_linear(x, w, w, w[:, 0].to("meta")), RuntimeError, "bias_gate is on meta"),
        (lambda x, w: F.gated_linear(x, w, w, None, w[:, 0].to("meta")), RuntimeError, "bias_up is on meta"),
        (lambda x, w: F.gated_linear(x, w, w.half()), RuntimeError, "weight_up has dtype torch.float16"),
        (lambda x, w: F.gated_linear(x, w, w, None, w[:, 0].half()), RuntimeError, "bias_up has dtype torch.float16"),
        (lambda x, w: F.maxout_linear(x, None), TypeError, "weight is of type NoneType"),
        (lambda x, w: F.maxout_linear(x, w[:4], None, "2"), TypeError, "num_pieces is '2', accepted is an int"),
        (lambda x, w: F.maxout_linear(x, w[:4], None, None), TypeError, "num_pieces is None"),
        (lambda x, w: F.maxout_linear(x, w[:4], None, 2.0), TypeError, "num_pieces is 2.0"),
        (lambda x, w: F.maxout_linear(x.repeat(1024, 256), w[:4].repeat(1, 256), None, 2.0), TypeError, "is 2.0"),
        (lambda x, w: dlops.nn.LinearAct(3, 4, activation="swish"), ValueError, "accepted are none"),
        (lambda x, w: dlops.use_backend("cudnn").__enter__(), ValueError, "'cudnn', accepted are 'torch'"),
    ],
)
@pytest.mark.parametrize("name", [None, "torch", "cpu", "cuda", "triton"])
def test_bad_input(name: str | None, call: Any, error: type[Exception], message: str) -> None:
    with dlops.use_backend(name), pytest.raises(error, match=message):
        call(torch.randn(2, 4), torch.randn(5, 4))


@pytest.mark.parametrize("rows", [4, 8192])
@pytest.mark.parametrize("activation", ["step", "sign"])
def test_the_gradient_of_a_step_is_zero(activation: str, rows: int) -> None:
    """Whether the op or its composition serves: not missing, as a comparison's is."""
    x, weight = torch.randn(rows, 16, requires_grad=True), torch.randn(32, 16, requires_grad=True)
    for y in (
        F.linear_act(x, weight, None, activation),
        F.gated_linear(x, weight, weight.detach(), None, None, activation),
    ):
        dweight = torch.autograd.grad(y.sum(), weight, materialize_grads=False)
        assert dweight[0].count_nonzero() == 0
    assert torch.equal(
        activate(torch.tensor([-1.0, -0.0, 0.0, 2.0, torch.nan]), "step", []), torch.tensor([0.0, 1, 1, 1, 0])
    )


@pytest.mark.parametrize("rows", [4, 8192])
def test_sparse_weights(rows: int) -> None:
    """As torch's linear serves them."""
    x, weight = torch.randn(rows, 16), torch.randn(32, 16).relu()
    for sparse in (weight.to_sparse(), weight.to_sparse_csr()):
        torch.testing.assert_close(F.linear_act(x, sparse), F.linear_act(x, weight))
        torch.testing.assert_close(F.gated_linear(x, sparse, weight), F.gated_linear(x, weight, weight))


def test_a_forced_backend_that_cannot_run_says_why() -> None:
    with dlops.use_backend("triton"), pytest.raises(RuntimeError, match="triton.*float64"):
        F.linear_act(torch.randn(2, 4).double(), torch.randn(5, 4).double())
    with dlops.use_backend("vendor"), pytest.raises(RuntimeError, match="maxout_linear has no vendor implementation"):
        F.maxout_linear(torch.randn(2, 4), torch.randn(4, 4))
