"""Mamba and Mamba-2 against their plain twins: values, gradients, training, and decoding step by step."""

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

import dlops
from dlops import backend, models
from dlops.models import plain
from dlops.testing import RATIO, check_draws, error_ratio

MIXER = {"d_model": 24, "d_state": 5, "d_conv": 3, "dt_rank": 2}
MIXER2 = {"d_model": 24, "d_state": 5, "d_conv": 3, "headdim": 8, "ngroups": 2}
MODEL = {"vocab_size": 31, "n_layer": 3}
MODELS = {"Mamba": MODEL | MIXER, "Mamba2": MODEL | MIXER2}
BLOCKS = {"MambaMixer": MIXER, "MambaBlock": MIXER, "Mamba2Mixer": MIXER2}


def twins(name: str) -> tuple[nn.Module, nn.Module]:
    """The block and its plain twin, with the same parameters."""
    sizes = (MODELS | BLOCKS)[name]
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
@pytest.mark.parametrize("block", [*BLOCKS, *MODELS])
def test_equal_to_plain(block: str, name: str | None, dtype: torch.dtype) -> None:
    if name is not None and backend.missing(name):
        pytest.skip(str(backend.missing(name)))
    ours, theirs = (model.to(dtype) for model in twins(block))
    exactly = copy.deepcopy(theirs).double()
    draws = []
    for _ in range(32):  # few small gradients say little about their largest error
        steps = 70 if block == "Mamba2Mixer" else 19  # more than a chunk of its scan
        x = torch.randint(31, (2, steps)) if block in MODELS else torch.randn(2, steps, 24).to(dtype)
        with dlops.use_backend(name):
            found = run(ours, x)
        draws.append(zip(found, run(theirs, x), run(exactly, x.double() if x.is_floating_point() else x), strict=True))
    check_draws(draws)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prefill", [0, 1, 2, 7])
@pytest.mark.parametrize("name", MODELS)
def test_decoding_equals_the_parallel_form_step_by_step(name: str, prefill: int, dtype: torch.dtype) -> None:
    ours, theirs = (model.to(dtype) for model in twins(name))
    exactly, tokens = copy.deepcopy(ours).double(), torch.randint(31, (2, 12))
    states = ours.initial_states(2)
    first = [ours(tokens[:, :prefill], states)] if prefill else []
    steps = [ours.step(tokens[:, t], states)[:, None] for t in range(prefill, 12)]
    again, exact = ours.initial_states(2), exactly.initial_states(2)
    logits = [torch.cat([*first, *steps], 1), ours(tokens, again), exactly(tokens, exact)]
    found = [
        (logits[0], theirs(tokens), logits[2]),
        *zip(*map(itertools.chain.from_iterable, (states, again, exact)), strict=True),
    ]
    for decoded, parallel, y64 in found:
        if dtype == torch.float64:
            torch.testing.assert_close(decoded, parallel)
        else:
            assert max(error_ratio(decoded.detach(), parallel, y64)) <= RATIO


@pytest.mark.parametrize("name", MODELS)
def test_generation_takes_the_most_likely_token(name: str) -> None:
    model, _ = twins(name)
    tokens = torch.randint(31, (2, 4))
    found = model.generate(tokens, 9)
    assert found.shape == (2, 13) and torch.equal(found[:, :4], tokens)
    assert torch.equal(found[:, 4:], model(found)[:, 3:-1].argmax(-1))


@pytest.mark.parametrize("name", ["Mamba", "Mamba2"])
def test_decodes_under_autocast(name: str) -> None:
    sizes = {"headdim": 8} if name == "Mamba2" else {}
    model, tokens = getattr(models, name)(50, 16, 2, **sizes), torch.randint(50, (2, 7))
    with torch.autocast("cpu", torch.bfloat16):
        states = model.initial_states(2)
        prefix = model(tokens[:, :4], states)
        steps = [model.step(token, states) for token in tokens[:, 4:].unbind(1)]
        assert all(step.dtype == torch.bfloat16 for step in steps)
        assert model.generate(tokens, 3).shape == (2, 10)
        whole = model(tokens)
    exact = copy.deepcopy(model).double()(tokens)
    assert max(error_ratio(torch.cat([prefix, torch.stack(steps, 1)], 1), whole, exact)) <= RATIO


@pytest.mark.parametrize("name", MODELS)
def test_trains_on_a_sequence_in_pieces(name: str) -> None:
    """Truncated backpropagation through time: states go on from piece to piece, gradients do not."""
    model, _ = twins(name)
    tokens = torch.randint(31, (2, 20))
    states, found = model.initial_states(2), []
    for piece in tokens.split(10, 1):
        logits = model(piece, states)
        found.append((logits, torch.autograd.grad(logits.square().sum(), list(model.parameters()))))
    torch.testing.assert_close(torch.cat([logits for logits, _ in found], 1), model(tokens))
    alone = torch.autograd.grad(model(tokens[:, :10]).square().sum(), list(model.parameters()))
    torch.testing.assert_close(found[0][1], alone)
    assert all(gradient.isfinite().all() for gradient in found[1][1])


@pytest.mark.parametrize("name", ["Mamba", "Mamba2", "S4D", "S5"])
def test_one_exported_graph_serves_every_length(name: str) -> None:
    model = twins(name)[0] if name in MODELS else getattr(models, name)(6, 8)

    def example(seqlen: int) -> Tensor:
        return torch.randint(31, (2, seqlen)) if name in MODELS else torch.randn(2, seqlen, 6)

    lengths = {1: torch.export.Dim("seqlen", min=2, max=512)}
    exported = torch.export.export(model, (example(9),), dynamic_shapes=(lengths,)).module()
    for seqlen in (2, 64, 65, 200):
        x = example(seqlen)
        torch.testing.assert_close(exported(x), model(x))


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
    with torch.device("meta"):
        assert sum(p.numel() for p in models.mamba2_130m().parameters()) == 128_989_632


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


@pytest.mark.parametrize(("tied", "ngroups"), [(False, 2), (True, 1)])
def test_loads_hugging_faces_mamba2(tied: bool, ngroups: int) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Mamba2Config(
        vocab_size=31, hidden_size=24, num_hidden_layers=2, state_size=5, num_heads=6, head_dim=8, n_groups=ngroups,
        chunk_size=4, tie_word_embeddings=tied, bos_token_id=None, eos_token_id=None
    )  # fmt: skip
    theirs = transformers.Mamba2ForCausalLM(config)
    ours = models.Mamba2(31, 24, 2, tied, d_state=5, headdim=8, ngroups=ngroups)
    ours.load_state_dict(theirs.state_dict())
    tokens = torch.randint(31, (2, 11))
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits)


def test_bad_input() -> None:
    for sizes in ({"headdim": 7}, {"headdim": 8, "ngroups": 4}):
        with pytest.raises(ValueError, match=r"accepted are a divisor of d_inner = 48 and one of the number of heads"):
            models.Mamba2Mixer(24, **sizes)
