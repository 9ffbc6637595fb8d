"""A Mamba language model by Hugging Face, patched and as they wrote it, with random weights.

Their mixer without compiled kernels slices the tensors of all steps in a loop, so its backward is quadratic in them.
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


def _model(layers: int) -> nn.Module:
    try:
        import transformers
    except ImportError as error:
        raise Unavailable(f"transformers cannot be imported ({error})") from error
    config = transformers.MambaConfig(vocab_size=2048, hidden_size=768, num_hidden_layers=layers)
    model: Any = transformers.MambaForCausalLM(config)
    return model


@case(
    cpu=[(1, 128, 2)],
    cuda=[(8, 1024, 24)],
    more_cpu=[(1, 128, 4), (1, 1024, 4)],
    label="{}x{} tokens, {} layers of width 768",
)
def mamba_language_model(device: torch.device, dtype: torch.dtype, batch: int, tokens: int, layers: int) -> Problem:
    eager = Logits(_model(layers)).to(device, dtype)
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
