"""Mamba language models by Hugging Face, patched and as they wrote them, with random weights; and decoding by ours.

Mamba's mixer without compiled kernels slices the tensors of all steps in a loop, so its backward is quadratic in them;
Mamba-2's is the chunked form.
"""

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import dlops
from bench.case import Problem, Unavailable, case
from dlops import models


class Logits(nn.Module):
    """Token ids (batch, tokens) to logits (batch, tokens, vocabulary)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


def _hugging_face(name: str, **config: int) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise Unavailable(f"transformers cannot be imported ({error})") from error
    return getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**config))


def _problem(name: str, device: torch.device, dtype: torch.dtype, batch: int, tokens: int, **config: int) -> Problem:
    """A model's forward and backward; FLOPs are those of its matrix products."""
    eager = Logits(_hugging_face(name, **config, vocab_size=2048, hidden_size=768)).to(device, dtype)
    patched = copy.deepcopy(eager)
    dlops.patch(patched)
    args = (torch.randint(2048, (batch, tokens), device=device),)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        patched(*args)
    flops = counter.get_total_flops()
    weights = sum(p.nbytes for p in eager.parameters())
    return Problem(
        dlops=patched,
        eager=eager,
        args=args,
        bytes=(weights, 3 * weights),
        flops=(flops, 3 * flops),
        compile=False,
    )


LABEL = "{}x{} tokens, {} layers of width 768"


@case(cpu=[(1, 128, 2)], cuda=[(8, 1024, 24)], more_cpu=[(1, 128, 4), (1, 1024, 4)], label=LABEL)
def mamba_language_model(device: torch.device, dtype: torch.dtype, batch: int, tokens: int, layers: int) -> Problem:
    return _problem("Mamba", device, dtype, batch, tokens, num_hidden_layers=layers)


@case(cuda=[(8, 1024, 24)], more_cpu=[(1, 512, 2), (1, 1024, 4)], label=LABEL)
def mamba2_language_model(device: torch.device, dtype: torch.dtype, batch: int, tokens: int, layers: int) -> Problem:
    heads = {"num_heads": 24, "head_dim": 64, "n_groups": 1}
    return _problem("Mamba2", device, dtype, batch, tokens, num_hidden_layers=layers, **heads)


@case(cpu=[(1,)], cuda=[(64,)], more_cpu=[(16,)], more_cuda=[(1,)], label="B{}", directions=("forward",))
def mamba_130m_step(device: torch.device, dtype: torch.dtype, batch: int) -> Problem:
    """One more token of each sequence, beside Hugging Face's model with the same weights and its cache. Reads every
    weight once."""
    model = models.mamba_130m().to(device, dtype)
    theirs = _hugging_face("Mamba", num_hidden_layers=len(model.backbone.layers)).to(device, dtype)
    theirs.load_state_dict(model.state_dict())
    prompt = torch.randint(model.lm_head.out_features, (batch, 8), device=device)
    states = model.initial_states(batch)
    model(prompt, states)
    parameters = inspect.signature(theirs.forward).parameters
    cache = "cache" if "cache" in parameters else "cache_params"  # its older name
    kept = {cache: getattr(theirs(prompt, use_cache=True), cache)}
    weights = sum(p.nbytes for p in model.parameters())
    return Problem(
        dlops=lambda tokens: model.step(tokens, states),
        eager=lambda tokens: theirs(tokens[:, None], use_cache=True, **kept).logits[:, 0],
        args=(prompt[:, -1],),
        bytes=(weights, 0),
        flops=(2.0 * batch * weights / dtype.itemsize, 0),
        compile=False,
    )
