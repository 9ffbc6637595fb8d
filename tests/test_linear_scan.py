"""The linear recurrence: samples for the contract, other formulas as the reference, bad input."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import dlops
import dlops.functional as F
from dlops import backend
from dlops._op import acc
from dlops.ops import linear_scan
from dlops.testing import Make, samples


def arguments(
    make: Make, batch: int, dim: int, seqlen: int, *, last: bool = False, state: bool = True, complex_: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """a, b and the initial state; |a| <= 1, so that whatever the kind of values nothing grows without bound."""

    def per_step() -> Tensor:
        x = make(batch, seqlen, dim)
        if complex_:
            x = torch.complex(acc(x), acc(make(batch, seqlen, dim)))
        return x.mT if last else x.mT.contiguous()

    a, b = per_step(), per_step()
    a = torch.view_as_real(a) if complex_ else a
    a = (a.double() / (1 + a.double().abs()) / (2**0.5 if complex_ else 1)).to(a.dtype)
    a = torch.view_as_complex(a) if complex_ else a
    initial = torch.complex(acc(make(batch, dim)), acc(make(batch, dim))) if complex_ else make(batch, dim)
    return a, b, acc(initial) if state else None


@samples(linear_scan.linear_scan, degree=2.5)
def linear_scan_samples(make: Make) -> Iterator[tuple[Any, ...]]:
    yield (*arguments(make, 2, 5, 3), False)
    yield (*arguments(make, 2, 3, 4, last=True), True)
    yield (*arguments(make, 3, 2, 2, state=False), True)
    yield (*arguments(make, 2, 4, 5, complex_=True), False)
    for i, dim in enumerate((1, 7, 8, 9, 16, 19)):
        for j, seqlen in enumerate((0, 1, 31, 32, 33, 70)):
            flags = {"last": (i + j) % 2 == 0, "state": (i + j) % 3 > 0}
            yield (*arguments(make, 2, dim, seqlen, complex_=(i + j) % 4 > 1, **flags), j % 2 == 0)
            if 1 < seqlen < 33 and dim > 7:
                yield (*arguments(make, 1, dim, seqlen, complex_=(i + j) % 4 < 2, **flags), j % 2 > 0)
    yield (*arguments(make, 1, 300, 40, last=True), False)
    yield (*arguments(make, 0, 8, 5), False)
    yield (*arguments(make, 2, 0, 5), True)
    # Behind the fences of tests/fence.cpp the definition's backward would need more maps than a process may have.
    if make.kind == "normal" and make.dtype == torch.float32 and "DLOPS_FENCE" not in os.environ:
        yield (*arguments(make, 1, 9, 2100, last=True), False)
        yield (*arguments(make, 1, 9, 2100, complex_=True), True)


@samples(linear_scan.linear_scan_backward, degree=3.5)
def linear_scan_backward_samples(make: Make) -> Iterator[tuple[Any, ...]]:
    for a, b, initial, reverse in linear_scan_samples(make):
        h = linear_scan.linear_scan.definition(a, b, initial, reverse)
        dh = torch.complex(*(acc(make(*h.shape)) for _ in range(2))) if h.is_complex() else make(*h.shape)
        yield dh, a, h, initial, reverse, [True, True, initial is not None]
        if h.shape == (2, 8, 33):
            for i in range(3):
                yield dh, a, h, initial, reverse, [i == j for j in range(3)]


@pytest.mark.parametrize("name", ["torch", None])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128], ids=str)
def test_equal_to_the_sum_over_all_pairs_of_steps(dtype: torch.dtype, reverse: bool, name: str | None) -> None:
    """h[t] = sum over s <= t of a[s + 1] ... a[t] b[s], as a triangular matrix."""
    a, b = (torch.randn(2, 5, 40, dtype=dtype) for _ in range(2))
    initial = torch.randn(2, 5, dtype=dtype)
    a = a / a.abs().clamp(min=1)
    with dlops.use_backend(name):
        h = F.linear_scan(a, b, initial, reverse)
    if reverse:
        a, b, h = (x.flip(2) for x in (a, b, h))
    products = torch.ones(2, 5, 41, 41, dtype=dtype).tril()
    for t in range(1, 41):
        products[:, :, t, :t] = products[:, :, t - 1, :t] * a[:, :, t - 1, None]
    expected = (products @ torch.cat([initial[..., None], b], 2)[..., None])[..., 1:, 0]
    torch.testing.assert_close(h, expected)


@pytest.mark.parametrize("name", ["torch", None])
def test_a_sequence_in_pieces(name: str | None) -> None:
    a, b = torch.rand(2, 6, 50), torch.randn(2, 6, 50)
    with dlops.use_backend(name):
        h = F.linear_scan(a, b)
        first = F.linear_scan(a[..., :21], b[..., :21])
        rest = F.linear_scan(a[..., 21:], b[..., 21:], first[..., -1])
    torch.testing.assert_close(torch.cat([first, rest], 2), h, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["torch", None])
def test_functional_broadcasts_and_promotes(name: str | None) -> None:
    a = (torch.rand(6, 1) * torch.exp(1j * torch.randn(6, 1))).requires_grad_()
    b, initial = torch.randn(2, 6, 9, requires_grad=True), torch.randn(2, 6)
    with dlops.use_backend(name):
        h = F.linear_scan(a, b, initial)
    steps, last = [], initial + 0j
    for t in range(9):
        last = a[:, 0] * last + b[..., t]
        steps.append(last)
    expected = torch.stack(steps, 2)
    torch.testing.assert_close(h, expected)
    dh = torch.randn_like(h)
    torch.testing.assert_close(
        torch.autograd.grad(h, (a, b), dh), torch.autograd.grad(expected, (a, b), dh), rtol=1e-4, atol=1e-5
    )


@pytest.mark.skipif(backend.missing("cpu") is not None, reason="dlops._C is not built")
@pytest.mark.parametrize("complex_", [False, True])
def test_threads_do_not_change_bits(complex_: bool) -> None:
    args = [a.requires_grad_() for a in arguments(Make(), 2, 300, 200, complex_=complex_) if a is not None]
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with dlops.use_backend("cpu"):
                h = linear_scan.linear_scan(*args, False)
                results.append((h, *torch.autograd.grad(h, args, torch.ones_like(h))))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, rtol=0, atol=0)


def test_conjugated_views() -> None:
    a, b, _ = arguments(Make(), 2, 5, 9, complex_=True)
    expected = linear_scan.linear_scan.definition(a.conj().resolve_conj(), b.conj().resolve_conj(), None, False)
    torch.testing.assert_close(F.linear_scan(a.conj(), b.conj()), expected)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.rand(6, 5), torch.rand(6, 5)), r"a has shape \(6, 5\), accepted is \(batch, dim, seqlen\)"),
        ((torch.rand(2, 6, 5), torch.rand(2, 6, 4)), "size of tensor"),
        ((torch.ones(2, 6, 5).int(), torch.ones(2, 6, 5).int()), "a has dtype torch.int32"),
        (
            (torch.rand(2, 6, 5), torch.rand(2, 6, 5), torch.rand(2, 5)),
            r"initial_state has shape \(2, 5\), accepted is \(batch, dim\) = \(2, 6\)",
        ),
        ((torch.rand(2, 6, 5), torch.rand(2, 6, 5, device="meta")), "b is on meta, accepted is a's device, cpu"),
    ],
)
def test_bad_input(args: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        F.linear_scan(*args)


def test_the_op_promotes_nothing() -> None:
    a = torch.rand(2, 6, 5)
    with pytest.raises(RuntimeError, match="b has dtype torch.float64, accepted is torch.float32"):
        linear_scan.linear_scan(a, a.double(), None, False)
    with pytest.raises(RuntimeError, match="initial_state has dtype torch.bfloat16, accepted is torch.float32"):
        linear_scan.linear_scan(a, a, torch.rand(2, 6).bfloat16(), False)
