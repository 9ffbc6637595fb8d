"""Every block against its plain twin: one state dict, values and gradients under the contract's error ratio."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import dlops
from dlops import backend, models
from dlops.models import plain
from dlops.testing import RATIO, error_ratio

BLOCKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], tuple[int, ...]]] = {
    "McCullochPitts": (lambda: models.McCullochPitts(9, 4), lambda: plain.McCullochPitts(9, 4), (17, 9)),
    "Perceptron": (lambda: models.Perceptron(9, 4), lambda: plain.Perceptron(9, 4), (17, 9)),
    "MLP": (lambda: models.MLP([9, 33, 17, 5], "gelu"), lambda: plain.MLP([9, 33, 17, 5], "gelu"), (3, 17, 9)),
    "MaxoutNetwork": (lambda: models.MaxoutNetwork([9, 16, 5], 3), lambda: plain.MaxoutNetwork([9, 16, 5], 3), (17, 9)),
}


def run(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output and the gradients of the input and of every parameter."""
    x = x.clone().requires_grad_()
    y = model(x)
    leaves = [x, *model.parameters()]
    if not y.requires_grad:
        return [y, *map(torch.zeros_like, leaves)]
    return [y, *torch.autograd.grad(y.square().sum(), leaves, allow_unused=True, materialize_grads=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [None, "torch", "cpu", "triton"])  # vendor and cuda serve parts of the family
@pytest.mark.parametrize("block", BLOCKS)
def test_equal_to_plain(block: str, name: str | None, dtype: torch.dtype, device: str) -> None:
    if name is not None and backend.missing(name):
        pytest.skip(str(backend.missing(name)))
    make_ours, make_plain, shape = BLOCKS[block]
    theirs = make_plain().to(device, dtype)
    ours = make_ours().to(device, dtype)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(shape, device=device).to(dtype)
    exact = run(copy.deepcopy(theirs).double(), x.double())
    with dlops.use_backend(name):
        found = run(ours, x)
    for y, yd, y64 in zip(found, run(theirs, x), exact, strict=True):
        largest, rms = error_ratio(y, yd, y64)
        assert largest <= RATIO and rms <= RATIO


def test_perceptron_learns_a_separable_problem() -> None:
    x = torch.randn(200, 3)
    target = torch.sign(x @ torch.tensor([[1.0], [-2.0], [0.5]]) + 0.3)
    perceptron = models.Perceptron(3)
    errors = [perceptron.learn(x, target, lr=0.1) for _ in range(300)]
    assert errors[-1] < errors[0] and errors[-1] <= 4


def test_mlp_trains_on_digits_as_plain_torch() -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, target = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    curves, accuracies = [], []
    start = plain.MLP([64, 128, 64, 10]).state_dict()
    for model in (plain.MLP([64, 128, 64, 10]), models.MLP([64, 128, 64, 10])):
        model.load_state_dict(start)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        losses = []
        for step in range(300):
            batch = torch.arange(step * 256, (step + 1) * 256) % 1500
            loss = nn.functional.cross_entropy(model(x[batch]), target[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(torch.tensor(losses))
        accuracies.append((model(x[1500:]).argmax(1) == target[1500:]).float().mean().item())
    print(f"digits: final loss {curves[0][-1]:.4f} plain, {curves[1][-1]:.4f} dlops; test accuracy {accuracies}")
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-3, atol=1e-4)
    assert accuracies[0] == accuracies[1] > 0.9
