"""The norm family: samples for the contract, torch's functions as the reference, bad input."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import dlops
import dlops.functional as F
from dlops import backend
from dlops.ops import norm
from dlops.testing import Make, check_ratios, samples

# Odd sizes, tile edges +-1, one element, empty, 1-d to 5-d.
SHAPES = [(7,), (1, 1), (9, 5), (2, 0), (0, 8), (9, 127), (9, 128), (9, 129), (3, 4, 513), (2, 1, 3, 2, 9)]
LONG = (5, 8193)
LONGEST = (2, 20_001)  # more than any kernel holds, in several chunks


def _parameters(make: Make, *shapes: tuple[int, ...]) -> Iterator[tuple[Tensor | None, ...]]:
    yield tuple(make(*shape) for shape in shapes)
    yield tuple(None for _ in shapes)


@samples(norm.rms_norm)
def rms_norm_samples(make: Make) -> Iterator[tuple[Any, ...]]:
    for shape in SHAPES:
        for (weight,) in _parameters(make, shape[-1:]):
            yield make(*shape), weight, 1e-6
    yield make(3, 9), make(9), 0.0
    yield make(*LONG), make(*LONG[1:]), 1e-6
    yield make(*LONGEST), None, 1e-6


@samples(norm.layer_norm)
def layer_norm_samples(make: Make) -> Iterator[tuple[Any, ...]]:
    for shape in SHAPES:
        for weight, bias in _parameters(make, shape[-1:], shape[-1:]):
            yield make(*shape), weight, bias, 1e-5
    yield make(3, 9), make(9), None, 1e-3
    yield make(3, 9), None, make(9), 1e-3
    yield make(*LONG), make(*LONG[1:]), make(*LONG[1:]), 1e-5
    yield make(*LONGEST), None, None, 1e-5


@samples(norm.add_rms_norm)
def add_rms_norm_samples(make: Make) -> Iterator[tuple[Any, ...]]:
    for x, weight, eps in rms_norm_samples(make):
        yield x, make(*x.shape), weight, eps


@samples(norm.add_layer_norm)
def add_layer_norm_samples(make: Make) -> Iterator[tuple[Any, ...]]:
    for x, weight, bias, eps in layer_norm_samples(make):
        yield x, make(*x.shape), weight, bias, eps


@samples(norm.rms_norm_backward, degree=6)
def rms_norm_backward_samples(make: Make) -> Iterator[tuple[Any, ...]]:
    for x, weight, eps in rms_norm_samples(make):
        if x.shape == LONGEST:
            continue
        rstd = norm.rms_norm.definition(x, weight, eps)[1]
        for dsum in (None, make(*x.shape))[: 1 if x.shape == LONG else 2]:
            yield make(*x.shape), x, weight, rstd, dsum, [True, weight is not None]
    x, weight = make(8, 9), make(9)
    rstd = norm.rms_norm.definition(x, weight, 1e-6)[1]
    for mask in ([False, True], [True, False]):
        yield make(8, 9), x, weight, rstd, None, mask


@samples(norm.layer_norm_backward, degree=6)
def layer_norm_backward_samples(make: Make) -> Iterator[tuple[Any, ...]]:
    for x, weight, bias, eps in layer_norm_samples(make):
        if x.shape == LONGEST:
            continue
        _, mean, rstd = norm.layer_norm.definition(x, weight, bias, eps)
        for dsum in (None, make(*x.shape))[: 1 if x.shape == LONG else 2]:
            yield make(*x.shape), x, weight, mean, rstd, dsum, [True, weight is not None, bias is not None]
    x, weight = make(8, 9), make(9)
    _, mean, rstd = norm.layer_norm.definition(x, weight, None, 1e-6)
    for mask in ([False, True, False], [False, False, True], [True, False, False]):
        yield make(8, 9), x, weight, mean, rstd, None, mask


@pytest.mark.parametrize("shape", [(4, 6), (3, 4, 6), (2, 3, 4, 6)])
@pytest.mark.parametrize("dims", [1, 2])
def test_equal_to_torch(shape: tuple[int, ...], dims: int) -> None:
    x, normalized = torch.randn(shape, dtype=torch.float64), list(shape[-dims:])
    weight, bias = torch.randn(normalized, dtype=torch.float64), torch.randn(normalized, dtype=torch.float64)
    for name in ("torch", None):
        with dlops.use_backend(name):
            torch.testing.assert_close(
                F.layer_norm(x, normalized, weight, bias, 1e-3),
                torch.nn.functional.layer_norm(x, normalized, weight, bias, 1e-3),
            )
            torch.testing.assert_close(
                F.rms_norm(x, normalized, weight, None), torch.nn.functional.rms_norm(x, normalized, weight, None)
            )
            normed, total = F.add_layer_norm(x, x + 1, normalized, weight, bias)
            torch.testing.assert_close(total, x + x + 1)
            torch.testing.assert_close(normed, torch.nn.functional.layer_norm(x + x + 1, normalized, weight, bias))
            normed, total = F.add_rms_norm(x, x + 1, normalized, weight)
            torch.testing.assert_close(total, x + x + 1)
            torch.testing.assert_close(normed, torch.nn.functional.rms_norm(x + x + 1, normalized, weight))


@pytest.mark.parametrize(("width", "value"), [(3, 12345.678), (1000, 12345.678), (5000, 12345.678), (20_000, 98765.43)])
def test_a_row_of_one_value_is_zero(width: int, value: float) -> None:
    """As in torch: what is left of a rounded mean must not be scaled up by a tiny variance, or one below zero."""
    for name in ("cpu", "triton", "cuda"):
        x = torch.full((40, width), value)
        if backend.refusal(norm.layer_norm, name, (x, None, None, 1e-5)) is None:
            with dlops.use_backend(name):
                assert F.layer_norm(x, [width]).abs().max() < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_sum_is_rounded_once(dtype: torch.dtype, device: str) -> None:
    """To the nearest, ties to even, bit for bit as by torch."""
    x = torch.randn(40, 65, dtype=dtype, device=device).t()
    residual = torch.randn(65, 44, dtype=dtype, device=device)[:, :40]
    x[0, 0] = float("nan")
    for name in ("cpu", "triton", "cuda"):
        if backend.refusal(norm.add_rms_norm, name, (x, residual, None, 1e-5)) is None:
            with dlops.use_backend(name):
                _, total, _ = norm.add_rms_norm(x, residual, None, 1e-5)
            torch.testing.assert_close(total, x + residual, rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(backend.missing("cpu") is not None, reason="dlops._C is not built")
@pytest.mark.parametrize("width", [2048, 2051])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outputs_too_large_for_the_caches(dtype: torch.dtype, width: int) -> None:
    """The CPU's kernels write them past the caches, which only aligned rows allow: the same rows over and over."""
    make = Make(dtype)
    rows, weight = [make(525, width) for _ in range(3)], make(width)

    def results(dy: Tensor, x: Tensor, residual: Tensor) -> list[Tensor]:
        with dlops.use_backend("cpu"):
            y, total, mean, rstd = norm.add_layer_norm(x, residual, weight, weight, 1e-5)
            dx, *_ = norm.layer_norm_backward(dy, total, weight, mean, rstd, None, [True, False, False])
        return [y, total, dx]

    for large, small in zip(results(*[x.repeat(8, 1) for x in rows]), results(*rows), strict=True):
        assert torch.equal(large.view(8, *small.shape), small.expand(8, *small.shape))


@pytest.mark.skipif(backend.missing("cpu") is not None, reason="dlops._C is not built")
def test_gradients_of_more_rows_than_one_run_sums() -> None:
    make = Make()
    dy, x, weight = make(4200, 9), make(4200, 9), make(9)
    _, mean, rstd = norm.layer_norm.definition(x, weight, None, 1e-5)
    check_ratios(norm.layer_norm_backward, [[dy, x, weight, mean, rstd, None, [True] * 3]], "cpu")


def test_modules_share_torch_state_dicts() -> None:
    for ours, theirs in [
        (dlops.nn.RMSNorm(6, eps=1e-3), torch.nn.RMSNorm(6, eps=1e-3)),
        (dlops.nn.LayerNorm((5, 6), bias=False), torch.nn.LayerNorm((5, 6), bias=False)),
    ]:
        for p in theirs.parameters():
            torch.nn.init.normal_(p)
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(40, 5, 6)
        torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda x: F.add_rms_norm(x, x[:, :3], [4]),
            RuntimeError,
            r"residual has shape \(2, 3\), accepted is input's shape = \(2, 4\)",
        ),
        (lambda x: F.add_rms_norm(x, x, [4], eps=-1.0), ValueError, "eps is -1.0, accepted are numbers >= 0"),
        (lambda x: F.add_rms_norm(x, x, [5]), RuntimeError, "input has shape"),
        (lambda x: F.add_rms_norm(x, x, [4], x[0, :3]), RuntimeError, r"weight has shape \(3,\)"),
        (lambda x: F.add_rms_norm(x, x.double(), [4]), RuntimeError, "residual has dtype torch.float64"),
        (lambda x: F.add_rms_norm(x.long(), x.long(), [4]), RuntimeError, "input has dtype torch.int64"),
        (lambda x: F.add_layer_norm(x + 0j, x + 0j, [4]), RuntimeError, "input has dtype torch.complex64"),
        (lambda x: F.add_layer_norm(x, x.to("meta"), [4]), RuntimeError, "residual is on meta"),
        (lambda x: F.add_layer_norm(x.half(), x.half(), [4], x[0]), RuntimeError, "weight has dtype torch.float32"),
        (lambda x: F.add_layer_norm(x, x, [4], x[0, :3]), RuntimeError, r"weight has shape \(3,\)"),
        (
            lambda x: F.add_layer_norm(x, x, [4], None, x[0, :3]),
            RuntimeError,
            r"bias has shape \(3,\), accepted is normalized_shape = \(4,\)",
        ),
        (
            lambda x: F.add_rms_norm(x.to_sparse(), x.to_sparse(), [4]),
            NotImplementedError,
            "input is a nested or sparse",
        ),
        (lambda x: F.add_layer_norm(x.to_sparse(), x.to_sparse(), [4]), NotImplementedError, "nested or sparse"),
        (lambda x: F.rms_norm(x.to_sparse(), [4]), NotImplementedError, "Sparse"),
        (lambda x: F.layer_norm(x, [4], eps=None), TypeError, "'eps'.* must be float, not NoneType"),
        (lambda x: F.rms_norm(x, [4], eps="a"), TypeError, "'eps'.* must be float, not str"),
        (lambda x: F.add_layer_norm(x, x, [4], eps=None), TypeError, "eps is None, accepted is a number"),
        (lambda x: F.add_rms_norm(x, x, [4], eps="a"), TypeError, "eps is 'a', accepted is a number"),
        (lambda x: F.add_layer_norm(x[0, 0], x[0, 0], []), RuntimeError, "input has shape"),
        (lambda x: F.add_layer_norm(x[0, 0], x[0, 0], [4]), RuntimeError, "input has shape"),
        (lambda x: torch.ops.dlops.rms_norm(x, x[0, :2], 1e-6), RuntimeError, r"weight has shape \(2,\)"),
        (lambda x: norm.layer_norm(x, None, x[0, :2], 1e-6), RuntimeError, r"bias has shape \(2,\)"),
        (lambda x: norm.layer_norm(x[0, 0], None, None, 1e-6), RuntimeError, "0-dimensional"),
        (lambda x: norm.rms_norm(x, None, "a"), TypeError, "rms_norm: eps is 'a', accepted is a number"),
    ],
)
def test_bad_input(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.randn(2, 4))


@pytest.mark.parametrize("rows", [2, 20_000])
@pytest.mark.parametrize("function", [F.add_rms_norm, F.add_layer_norm])
def test_arguments_of_other_types(function: Any, rows: int) -> None:
    """Named, whichever path the size leads to."""
    x = torch.randn(rows, 4)
    for args, message in [
        ((None, x, [4]), "input is of type NoneType, accepted is a Tensor"),
        ((x, None, [4]), "residual is of type NoneType, accepted is a Tensor"),
        ((x, 1.0, [4]), "residual is of type float"),
        ((x, x, [4], [1.0] * 4), "weight is of type list, accepted is a Tensor or None"),
        ((x, x, 4), "normalized_shape is 4, accepted is a sequence of ints"),
        ((x, x, None), "normalized_shape is None"),
        ((x, x, [4.0]), r"normalized_shape is \[4.0\]|element of type float"),
        ((x, x, "4"), "normalized_shape is '4'"),
    ]:
        with pytest.raises(TypeError, match=message):
            function(*args)


@pytest.mark.parametrize("rows", [2, 20_000])
@pytest.mark.parametrize("function", [F.add_rms_norm, F.add_layer_norm])
def test_the_sum_needs_no_gradient_of_a_parameter(function: Any, rows: int) -> None:
    x, residual, weight = torch.randn(rows, 4), torch.randn(rows, 4), torch.randn(4, requires_grad=True)
    normed, total = function(x, residual, [4], weight)
    assert normed.requires_grad and not total.requires_grad
    normed, total = function(x, residual.requires_grad_(), [4], weight)
    assert normed.requires_grad and total.requires_grad
    with torch.no_grad():
        assert not function(x, residual, [4], weight)[1].requires_grad


@pytest.mark.parametrize("rows", [2, 20_000])
@pytest.mark.parametrize("name", ["rms_norm", "layer_norm"])
def test_the_fused_follow_the_unfused_under_autocast(name: str, rows: int, device: str) -> None:
    half, full = torch.randn(rows, 4, device=device).bfloat16(), torch.randn(rows, 4, device=device)
    for x, residual, weight in (
        (half, half, full[0]),
        (half, half, half[0]),
        (half, full, full[0]),
        (full, full, None),
    ):
        with torch.autocast(device, torch.bfloat16):
            total = x + residual
            expected = getattr(F, name)(total, [4], weight), total
            found = getattr(F, f"add_{name}")(x, residual, [4], weight)
        torch.testing.assert_close(found, expected)


def test_nested_tensors_are_torchs_to_serve() -> None:
    nested = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(2, 8)])
    weight, bias = torch.randn(8), torch.randn(8)
    found = F.layer_norm(nested, [8], weight, bias)
    for ours, row in zip(found.unbind(), nested.unbind(), strict=True):
        torch.testing.assert_close(ours, torch.nn.functional.layer_norm(row, [8], weight, bias))
    with pytest.raises(ValueError, match="requires weight and bias"):
        F.layer_norm(nested, [8])
    for function in (F.add_rms_norm, F.add_layer_norm):
        with pytest.raises(NotImplementedError, match="input is a nested or sparse tensor"):
            function(nested, nested, [8])
