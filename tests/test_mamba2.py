"""Mamba-2's mixer against its plain twin: values, gradients, and decoding step by step."""

import copy

import pytest
import torch
from torch import Tensor, nn

import dlops
from dlops import backend, models
from dlops.models import plain
from dlops.testing import RATIO, error_ratio

SIZES = {"d_model": 24, "d_state": 5, "d_conv": 3, "headdim": 8, "ngroups": 2}


def twins() -> tuple[models.Mamba2Mixer, plain.Mamba2Mixer]:
    """The mixer and its plain twin, with the same parameters."""
    ours, theirs = models.Mamba2Mixer(**SIZES), plain.Mamba2Mixer(**SIZES)
    theirs.load_state_dict(ours.state_dict())
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    return ours, theirs


def run(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output and the gradients of the input and of every parameter."""
    x = x.clone().requires_grad_()
    y = model(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [None, "torch", "cpu"])
def test_equal_to_plain(name: str | None, dtype: torch.dtype) -> None:
    if name is not None and backend.missing(name):
        pytest.skip(str(backend.missing(name)))
    ours, theirs = (model.to(dtype) for model in twins())
    exactly = copy.deepcopy(theirs).double()
    draws = []
    for _ in range(8):  # few small gradients say little about their largest error
        x = torch.randn(2, 70, 24).to(dtype)
        with dlops.use_backend(name):
            found = run(ours, x)
        draws.append(zip(found, run(theirs, x), run(exactly, x.double()), strict=True))
    for triples in zip(*draws, strict=True):
        y, yd, y64 = (torch.stack(tensors).detach() for tensors in zip(*triples, strict=True))
        assert max(error_ratio(y, yd, y64)) <= RATIO


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("prefill", [0, 1, 2, 7])
def test_decoding_equals_the_parallel_form_step_by_step(prefill: int, dtype: torch.dtype) -> None:
    ours, theirs = (model.to(dtype) for model in twins())
    x = torch.randn(2, 12, 24, dtype=dtype)
    state = ours.initial_state(2)
    first = [ours(x[:, :prefill], state)] if prefill else []
    steps = [ours.step(x[:, t], state)[:, None] for t in range(prefill, 12)]
    decoded, parallel = torch.cat([*first, *steps], 1), ours(x)
    torch.testing.assert_close(decoded, parallel)
    torch.testing.assert_close(decoded, theirs(x))
    again = ours.initial_state(2)
    ours(x, again)
    torch.testing.assert_close(tuple(state), tuple(again))


@pytest.mark.parametrize("ngroups", [1, 2])
def test_equal_to_hugging_face(ngroups: int) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Mamba2Config(
        hidden_size=24, num_heads=6, head_dim=8, state_size=5, conv_kernel=3, n_groups=ngroups, expand=2, chunk_size=16
    )
    theirs = transformers.models.mamba2.modeling_mamba2.Mamba2Mixer(config, 0)
    ours = models.Mamba2Mixer(**SIZES | {"ngroups": ngroups})
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 33, 24)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_bad_input() -> None:
    for sizes in ({"headdim": 7}, {"headdim": 8, "ngroups": 4}):
        with pytest.raises(ValueError, match=r"accepted are a divisor of d_inner = 48 and one of the number of heads"):
            models.Mamba2Mixer(24, **sizes)
