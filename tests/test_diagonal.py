"""S4D's kernel and convolution, S5's scan, and their layers beside the plain ones."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import dlops
import dlops.functional as F
from dlops import backend, models
from dlops.models import plain
from dlops.testing import RATIO, check_draws, error_ratio


def system(dim: int, dstate: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A, C, dt and B of S4D."""
    A = torch.complex(-torch.rand(dim, dstate) - 0.1, math.pi * torch.arange(dstate).expand(dim, dstate))
    C, B = (torch.randn(dim, dstate, dtype=torch.complex64) for _ in range(2))
    dt = torch.rand(dim) * 0.1 + 1e-3
    return A.to(dtype.to_complex()), C.to(dtype.to_complex()), dt.to(dtype), B.to(dtype.to_complex())


def vandermonde(A: Tensor, C: Tensor, dt: Tensor, seqlen: int, B: Tensor) -> Tensor:
    """The kernel as it is written, with all dim x dstate x seqlen powers."""
    exponent = dt[:, None] * A
    powers = torch.exp(exponent[..., None] * torch.arange(seqlen))
    return 2 * ((C * B * (torch.exp(exponent) - 1) / A)[..., None] * powers).sum(1).real


@pytest.mark.parametrize("seqlen", [0, 1, 2, 3, 15, 16, 17, 100, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_kernel_equals_the_formula(dtype: torch.dtype, seqlen: int) -> None:
    leaves = [t.requires_grad_() for t in system(5, 7, dtype)]
    exact = [t.detach().to(torch.complex128 if t.is_complex() else torch.float64).requires_grad_() for t in leaves]
    A, C, dt, B = leaves
    kernel = F.s4d_kernel(A, C, dt, seqlen, B)
    expected = vandermonde(*exact[:3], seqlen, exact[3])
    assert kernel.dtype == dtype and kernel.shape == (5, seqlen)
    weight = torch.randn(5, seqlen, dtype=torch.float64)
    found = [kernel, *torch.autograd.grad((kernel * weight.to(dtype)).sum(), leaves)]
    expected = [expected, *torch.autograd.grad((expected * weight.to(dtype)).sum(), exact)]
    for y, y64 in zip(found, expected, strict=True):
        if y64.numel():
            assert (y - y64).abs().max() <= 32 * torch.finfo(dtype).eps * y64.abs().max()
    if seqlen:
        torch.testing.assert_close(F.s4d_kernel(A, C, dt, seqlen), F.s4d_kernel(A, C, dt, seqlen, torch.ones_like(B)))


def test_kernel_of_slow_steps_does_not_cancel() -> None:
    """exp(dt A) - 1 for a small dt."""
    A, C, _, B = system(5, 7, torch.float32)
    dt = torch.full((5,), 1e-6)
    exact = (2 * (C * B).to(torch.complex128).sum(1).real * dt.double())[:, None]
    torch.testing.assert_close(F.s4d_kernel(A, C, dt, 1, B).double(), exact, rtol=1e-4, atol=1e-9)


def test_kernel_materialises_no_powers() -> None:
    """The largest tensor is of order dim dstate sqrt(seqlen), in the backward too."""
    dim, dstate, seqlen = 2, 32, 65536
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, Tensor))
            return out

    leaves = [t.requires_grad_() for t in system(dim, dstate, torch.float32)]
    with Sizes():
        F.s4d_kernel(*leaves[:3], seqlen, leaves[3]).sum().backward()
    assert sizes and max(sizes) <= dim * seqlen


@pytest.mark.parametrize("seqlen", [0, 1, 5, 64, 127])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_fft_convolution_equals_the_sum(dtype: torch.dtype, seqlen: int) -> None:
    u, kernel, D = torch.randn(2, 3, seqlen).to(dtype), torch.randn(3, seqlen), torch.randn(3)
    y = F.fft_conv1d(u, kernel.to(dtype), D.to(dtype))
    u, kernel, D = (t.to(dtype).double() for t in (u, kernel, D))
    lag = torch.arange(seqlen)[:, None] - torch.arange(seqlen)
    toeplitz = torch.where(lag >= 0, kernel[:, lag.clamp(min=0)], 0)
    expected = torch.einsum("dts,bds->bdt", toeplitz, u) + D[:, None] * u
    tolerance = {"rtol": 1e-2, "atol": 0.2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 2e-5}
    torch.testing.assert_close(y.double(), expected, **tolerance)
    assert y.dtype == dtype


@pytest.mark.parametrize("shape", [(0, 2, 3), (2, 0, 3), (2, 3, 0)])
def test_fft_convolution_of_nothing(shape: tuple[int, int, int]) -> None:
    leaves = torch.ones(shape, requires_grad=True), torch.ones(shape[1:], requires_grad=True)
    y = F.fft_conv1d(*leaves, torch.ones(shape[1]))
    assert y.shape == shape
    u, kernel = torch.autograd.grad(y.sum(), leaves)
    assert u.shape == shape and torch.equal(kernel, torch.zeros(shape[1:]))


@pytest.mark.parametrize("name", ["torch", None])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_diagonal_scan_equals_powers(bidirectional: bool, name: str | None) -> None:
    """h[t] = a^(t + 1) h0 + sum over s <= t of a^(t - s) b[s]."""
    a = torch.polar(torch.rand(4), torch.randn(4)).requires_grad_()
    b = torch.randn(2, 4, 30, dtype=torch.complex64, requires_grad=True)
    initial = torch.randn(2, 4, dtype=torch.complex64, requires_grad=True)
    with dlops.use_backend(name):
        h = F.diagonal_scan(a, b, initial, bidirectional)
    lag = torch.arange(30)[:, None] - torch.arange(30)
    powers = torch.where(lag >= 0, a[:, None, None] ** lag.clamp(min=0), 0)
    expected = torch.einsum("dts,bds->bdt", powers, b) + a[:, None] ** torch.arange(1, 31) * initial[..., None]
    if bidirectional:
        expected = torch.cat([expected, torch.einsum("dst,bds->bdt", powers, b)], 1)
    torch.testing.assert_close(h, expected, rtol=1e-4, atol=1e-5)
    dh = torch.randn_like(h)
    found, wanted = (torch.autograd.grad(y, (a, b, initial), dh) for y in (h, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


LAYERS = {
    "S4D": {"d_model": 12, "d_state": 10},
    "S5": {"d_model": 12, "d_state": 10},
    "S5 both ways": {"d_model": 12, "d_state": 10, "bidirectional": True},
}


def run(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output and the gradients of the input and of every parameter."""
    x = x.clone().requires_grad_()
    y = model(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [None, "torch", "cpu"])
@pytest.mark.parametrize("layer", LAYERS)
def test_layers_equal_plain(layer: str, name: str | None, dtype: torch.dtype) -> None:
    if name is not None and backend.missing(name):
        pytest.skip(str(backend.missing(name)))
    kind = layer.split()[0]
    ours, theirs = getattr(models, kind)(**LAYERS[layer]).to(dtype), getattr(plain, kind)(**LAYERS[layer]).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    exactly = copy.deepcopy(theirs).double()
    draws = []
    for _ in range(32):  # few small gradients say little about their largest error
        x = torch.randn(2, 50, 12).to(dtype)
        with dlops.use_backend(name):
            found = run(ours, x)
        draws.append(zip(found, run(theirs, x), run(exactly, x.double()), strict=True))
    check_draws(draws)


@pytest.mark.parametrize("layer", ["S4D", "S5"])
def test_decoding_equals_the_parallel_form_step_by_step(layer: str) -> None:
    ours, theirs = getattr(models, layer)(6, 8), getattr(plain, layer)(6, 8)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 40, 6)
    state = ours.initial_state(2)
    steps = torch.stack([ours.step(x[:, t], state) for t in range(40)], 1)
    parallel, exactly = (model(x).detach() for model, x in ((theirs, x), (copy.deepcopy(theirs).double(), x.double())))
    assert max(error_ratio(steps, parallel, exactly)) <= RATIO


@pytest.mark.parametrize("layer", ["S4D", "S5"])
def test_autocast_leaves_the_system_alone(layer: str) -> None:
    ours, theirs = getattr(models, layer)(8, 6), getattr(plain, layer)(8, 6)
    theirs.load_state_dict(ours.state_dict())
    x, state = torch.randn(2, 70, 8), ours.initial_state(2)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = ours(x), theirs(x)
        steps = torch.stack([ours.step(t, state) for t in x.unbind(1)], 1)
    exact = copy.deepcopy(ours).double()(x.double())
    for y in (found, steps):
        assert max(error_ratio(y, expected, exact)) <= RATIO


def test_a_bidirectional_layer_does_not_decode() -> None:
    layer = models.S5(6, 8, bidirectional=True)
    state = layer.initial_state(2)
    with pytest.raises(RuntimeError, match="a step depends on later ones"):
        layer.step(torch.randn(2, 6), state)
    assert not state.any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda A, C, dt, B: F.s4d_kernel(A.real, C, dt, 5),
            r"A is torch.float64 of shape \(5, 7\), accepted is compl",
        ),
        (lambda A, C, dt, B: F.s4d_kernel(A, C[:4], dt, 5), r"C has shape \(4, 7\), accepted is A's, \(5, 7\)"),
        (lambda A, C, dt, B: F.s4d_kernel(A, C, dt[:4], 5), r"dt has shape \(4,\), accepted is \(dim,\) = \(5,\)"),
        (lambda A, C, dt, B: F.s4d_kernel(A, C, dt, 5, B[:, :1]), r"B has shape \(5, 1\)"),
        (lambda A, C, dt, B: F.s4d_kernel(A, C, dt, -1), "seqlen is -1, accepted are numbers >= 0"),
        (lambda A, C, dt, B: F.fft_conv1d(torch.rand(2, 3, 5), torch.rand(3, 4)), r"kernel \(3, 4\), accepted are"),
        (lambda A, C, dt, B: F.fft_conv1d(torch.rand(2, 3, 5), torch.rand(3, 5), dt), r"D has shape \(5,\), acc"),
    ],
)
def test_bad_input(call, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call(*system(5, 7))
