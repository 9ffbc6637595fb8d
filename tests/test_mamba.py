"""Mamba against its plain twin: values, gradients, training, and decoding step by step."""

import copy

import pytest
import torch
from torch import Tensor, nn

import dlops
from dlops import backend, models
from dlops.models import plain
from dlops.testing import RATIO, error_ratio

SIZES = {"vocab_size": 31, "d_model": 24, "n_layer": 3, "d_state": 5, "dt_rank": 2}
MIXER = {"d_model": 24, "d_state": 5, "d_conv": 3, "dt_rank": 2}


def twins(name: str) -> tuple[nn.Module, nn.Module]:
    """The block and its plain twin, with the same parameters."""
    sizes = SIZES if name == "Mamba" else MIXER
    ours, theirs = getattr(models, name)(**sizes), getattr(plain, name)(**sizes)
    theirs.load_state_dict(ours.state_dict())
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    return ours, theirs


def run(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output and the gradients of the input, if it can have one, and of every parameter."""
    x = x.clone().requires_grad_(x.is_floating_point())
    y = model(x)
    return [y, *torch.autograd.grad(y.square().sum(), [*([x] if x.requires_grad else []), *model.parameters()])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [None, "torch", "cpu"])
@pytest.mark.parametrize("block", ["MambaMixer", "MambaBlock", "Mamba"])
def test_equal_to_plain(block: str, name: str | None, dtype: torch.dtype) -> None:
    if name is not None and backend.missing(name):
        pytest.skip(str(backend.missing(name)))
    ours, theirs = (model.to(dtype) for model in twins(block))
    exactly = copy.deepcopy(theirs).double()
    draws = []
    for _ in range(8):  # few small gradients say little about their largest error
        x = torch.randint(31, (2, 19)) if block == "Mamba" else torch.randn(2, 19, 24).to(dtype)
        with dlops.use_backend(name):
            found = run(ours, x)
        draws.append(zip(found, run(theirs, x), run(exactly, x.double() if x.is_floating_point() else x), strict=True))
    for triples in zip(*draws, strict=True):
        y, yd, y64 = (torch.stack(tensors).detach() for tensors in zip(*triples, strict=True))
        assert max(error_ratio(y, yd, y64)) <= RATIO


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prefill", [0, 1, 2, 7])
def test_decoding_equals_the_parallel_form_step_by_step(prefill: int, dtype: torch.dtype) -> None:
    ours, theirs = (model.to(dtype) for model in twins("Mamba"))
    tokens = torch.randint(31, (2, 12))
    states = ours.initial_states(2)
    first = [ours(tokens[:, :prefill], states)] if prefill else []
    steps = [ours.step(tokens[:, t], states)[:, None] for t in range(prefill, 12)]
    decoded, parallel = torch.cat([*first, *steps], 1), ours(tokens)
    tolerance = {"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(decoded, parallel, **tolerance)
    torch.testing.assert_close(decoded, theirs(tokens), **tolerance)
    again = ours.initial_states(2)
    ours(tokens, again)
    for one, other in zip(states, again, strict=True):
        torch.testing.assert_close(tuple(one), tuple(other), **tolerance)


def test_generation_takes_the_most_likely_token() -> None:
    model, _ = twins("Mamba")
    tokens = torch.randint(31, (2, 4))
    found = model.generate(tokens, 9)
    assert found.shape == (2, 13) and torch.equal(found[:, :4], tokens)
    assert torch.equal(found[:, 4:], model(found)[:, 3:-1].argmax(-1))


def test_trains_as_plain() -> None:
    """A periodic sequence is learnt, with the loss of the plain model at every step."""
    tokens = (torch.arange(40)[None] * 3 + torch.arange(4)[:, None]) % 7
    curves = []
    for model in twins("Mamba"):
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        losses = []
        for _ in range(60):
            logits = model(tokens[:, :-1])
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(torch.tensor(losses))
    torch.testing.assert_close(curves[0], curves[1], rtol=1e-3, atol=1e-4)
    assert curves[0][-1] < 0.2 * curves[0][0]


def test_the_papers_model() -> None:
    model = models.mamba_130m()
    assert sum(p.numel() for p in model.parameters()) == 129_135_360
    mixer = model.backbone.layers[0].mixer
    dt = nn.functional.softplus(mixer.dt_proj.bias)
    assert (dt > 0.99e-3).all() and (dt < 1.01e-1).all()
    assert torch.equal(mixer.A_log[5].exp().round(), torch.arange(1.0, 17))


def test_loads_hugging_faces_state_dict() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(
        vocab_size=31, hidden_size=24, num_hidden_layers=2, state_size=5, time_step_rank=2, conv_kernel=4
    )
    theirs = transformers.MambaForCausalLM(config)
    ours = models.Mamba(31, 24, 2, d_state=5, dt_rank=2)
    ours.load_state_dict(theirs.state_dict())
    tokens = torch.randint(31, (2, 11))
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits)
