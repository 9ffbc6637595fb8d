"""Hugging Face's Mamba models, patched: values, gradients, generation from a cache, and back."""

import copy
import inspect
import os
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dlops.patch import patch, unpatch
from dlops.testing import RATIO, check_draws, error_ratio

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0, "eos_token_id": None}
# What transformers calls it, from 5.24 on and before.
CACHE = "cache" if "cache" in inspect.signature(transformers.MambaForCausalLM.forward).parameters else "cache_params"
MIXERS = {"Mamba": "MambaMixer", "Mamba2": "Mamba2Mixer", "FalconMamba": "FalconMambaMixer", "Jamba": "JambaMambaMixer"}


def small(name: str, **changes: Any) -> nn.Module:
    """A model of random parameters."""
    if name == "Jamba":
        sizes = {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "mamba_d_state": 5}
        sizes |= {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "mamba_dt_rank": 3}
        config = transformers.JambaConfig(**(SMALL | sizes | changes))
    else:
        heads = {"num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 4} if name == "Mamba2" else {}
        sizes = {"state_size": 5, "time_step_rank": 3} | heads
        config = getattr(transformers, f"{name}Config")(**(SMALL | sizes | changes))
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for parameter in model.parameters():  # biases too
        with torch.no_grad():
            parameter += 0.02 * torch.randn_like(parameter)
    return model.eval()


def patched(model: nn.Module) -> nn.Module:
    ours = copy.deepcopy(model)
    report = patch(ours)
    mixers = [entry for entry in report.replaced if entry.kind in MIXERS.values()]
    assert mixers and {entry.kind for entry in mixers} == {MIXERS[type(model).__name__.removesuffix("ForCausalLM")]}
    return ours


def run(model: nn.Module, tokens: Tensor, mask: Tensor | None) -> list[Tensor]:
    """The logits and the gradients of all parameters."""
    logits = model(tokens, attention_mask=mask, use_cache=False).logits
    return [logits, *torch.autograd.grad(logits.square().mean(), list(model.parameters()), materialize_grads=True)]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", MIXERS)
def test_logits_and_all_gradients(name: str, masked: bool, training: bool) -> None:
    theirs = small(name).train(training)
    ours, exact = patched(theirs), copy.deepcopy(theirs).double()
    draws = []
    for _ in range(32):  # few small gradients say little about their largest error
        tokens, mask = torch.randint(1, 61, (2, 11)), torch.ones(2, 11, dtype=torch.int64)
        mask[0, :3] = 0
        draws.append(zip(*(run(m, tokens, mask if masked else None) for m in (ours, theirs, exact)), strict=True))
    check_draws(draws)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", MIXERS)
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    theirs = small(name).to(dtype)
    ours, tokens = patched(theirs), torch.randint(1, 61, (2, 11))
    with torch.no_grad():
        logits = [model(tokens).logits for model in (ours, theirs, copy.deepcopy(theirs).double())]
        if dtype == torch.bfloat16:
            assert max(error_ratio(*logits)) <= RATIO
        else:  # the original computes parts of it in float32
            torch.testing.assert_close(*logits[:2], rtol=1e-6, atol=1e-6)
        found, expected = (model.generate(tokens, max_new_tokens=3, do_sample=False) for model in (ours, theirs))
    assert found.shape == expected.shape and (dtype == torch.bfloat16 or torch.equal(found, expected))


@pytest.mark.parametrize("name", MIXERS)
def test_autocast(name: str) -> None:
    theirs = small(name)
    ours, tokens = patched(theirs), torch.randint(1, 61, (2, 11))
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (run(model, tokens, None) for model in (ours, theirs))
        assert ours.generate(tokens, max_new_tokens=3, do_sample=False).shape == (2, 14)
    exact = run(copy.deepcopy(theirs).double(), tokens, None)
    assert max(error_ratio(found[0].detach(), expected[0], exact[0])) <= RATIO
    assert [gradient.dtype for gradient in found] == [gradient.dtype for gradient in expected]


@pytest.mark.parametrize("name", MIXERS)
def test_greedy_generation_is_identical(name: str) -> None:
    theirs = small(name)
    ours, tokens = patched(theirs), torch.randint(1, 61, (3, 7))
    mask = torch.ones_like(tokens)
    mask[1, :2] = 0
    for given in (None, mask):
        for cached in (True, False):
            options = {"attention_mask": given, "max_new_tokens": 24, "do_sample": False, "use_cache": cached}
            found, expected = (model.generate(tokens, **options) for model in (ours, theirs))
            assert found.shape == (3, 31) and torch.equal(found, expected)
    found, expected = (model.generate(tokens[:, :1], max_new_tokens=5, num_beams=3) for model in (ours, theirs))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("pieces", [[1] * 9, [4, 1, 1, 3], [9]])
@pytest.mark.parametrize("name", ["Mamba", "Mamba2", "FalconMamba"])
def test_a_cache_goes_on_where_it_was(name: str, pieces: list[int], grad: bool) -> None:
    """However many steps come at once, with and without gradients."""
    model = patched(small(name))
    tokens = torch.randint(1, 61, (2, 9))
    expected, found, cache = model(tokens).logits, [], None
    with torch.set_grad_enabled(grad):
        for piece in tokens.split(pieces, 1):
            output = model(piece, **{CACHE: cache}, use_cache=True)
            cache = output[CACHE]
            found.append(output.logits)
    assert all(logits.requires_grad == grad for logits in found)
    torch.testing.assert_close(torch.cat(found, 1), expected)


@pytest.mark.parametrize("name", MIXERS)
def test_unpatch_copies_and_pickles(name: str) -> None:
    theirs = small(name)
    ours, tokens = patched(theirs), torch.randint(1, 61, (2, 11))
    expected = theirs(tokens).logits
    assert not patch(ours).replaced
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(copied(tokens).logits, ours(tokens).logits)
        assert unpatch(copied) > 0
        assert [type(m) for m in copied.modules()] == [type(m) for m in theirs.modules()]
        assert torch.equal(copied(tokens).logits, expected)
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_what_is_left_alone() -> None:
    report = patch(small("Mamba", hidden_act="gelu"))
    reasons = {entry.reason for entry in report.skipped if entry.kind == "MambaMixer"}
    assert reasons == {"its activation is 'gelu', the kernels have silu"}

    model = small("Mamba")
    first, second = model.backbone.layers[0].mixer, model.backbone.layers[1].mixer
    first.conv1d._hf_hook = object()
    second.dt_proj.weight = type("Quantized", (nn.Parameter,), {})(second.dt_proj.weight.data)
    reasons = {entry.name: entry.reason for entry in patch(model).skipped if entry.kind == "MambaMixer"}
    assert "conv1d has a hook of accelerate" in reasons["backbone.layers.0.mixer"]
    assert reasons["backbone.layers.1.mixer"] == "its dt_proj.weight is a Quantized"


@pytest.mark.parametrize("name", ["cache", "cache_params"])
def test_the_cache_by_either_name(name: str) -> None:
    model = patched(small("Mamba"))
    mixer, x = model.backbone.layers[0].mixer, torch.randn(1, 6, 32)
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        whole = mixer(x)
        pieces = [mixer(piece, **{name: cache}) for piece in x.split(2, 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole)


def test_older_caches_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(transformers.Cache, "get_recurrent_state")
    report = patch(small("Mamba"))
    reasons = {entry.reason for entry in report.skipped if entry.kind == "MambaMixer"}
    assert len(reasons) == 1 and "it takes 5.21 or newer" in reasons.pop()


def test_packed_sequences_are_the_originals_matter() -> None:
    mixer = patched(small("Mamba")).backbone.layers[0].mixer
    with pytest.raises(ValueError, match="packed sequences"):
        mixer(torch.randn(1, 6, 32), seq_idx=torch.zeros(1, 6, dtype=torch.int32))


def test_one_graph_trains() -> None:
    model = patched(small("Mamba")).train()
    tokens = torch.randint(1, 61, (2, 11))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    results = []
    for forward in (model, compiled):
        loss = forward(tokens, labels=tokens, use_cache=False).loss
        results.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
    torch.testing.assert_close(*results)
