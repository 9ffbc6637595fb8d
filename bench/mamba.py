"""Mamba language models by Hugging Face, patched and as they wrote them, with random weights.

Mamba's mixer without compiled kernels slices the tensors of all steps in a loop, so its backward is quadratic in them;
Mamba-2's is the chunked form.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import dlops
from bench.case import Problem, Unavailable, case


class Logits(nn.Module):
    """Token ids (batch, tokens) to logits (batch, tokens, vocabulary)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


def _problem(name: str, device: torch.device, dtype: torch.dtype, batch: int, tokens: int, **config: int) -> Problem:
    """A model's forward and backward; FLOPs are those of its matrix products."""
    try:
        import transformers
    except ImportError as error:
        raise Unavailable(f"transformers cannot be imported ({error})") from error
    config |= {"vocab_size": 2048, "hidden_size": 768}
    model: Any = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**config))
    eager = Logits(model).to(device, dtype)
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
