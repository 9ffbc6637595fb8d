"""Feed-forward blocks: plain torch.nn beside the same block patched."""

import copy

import torch
from torch import nn

import dlops
from bench.case import Problem, case


@case(
    cpu=[(512, 768, 3072)],
    cuda=[(8192, 4096, 16384)],
    more_cpu=[(64, 784, 512)],
    more_cuda=[(16, 4096, 16384)],
    label="{0}x{1}->{2}->{1}",
)
def mlp_block(device: torch.device, dtype: torch.dtype, rows: int, width: int, hidden: int) -> Problem:
    """LayerNorm, linear, GELU, linear: the feed-forward half of a transformer layer."""
    layers = nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)
    eager = nn.Sequential(*layers).to(device, dtype)
    patched = copy.deepcopy(eager)
    dlops.patch(patched)
    x = torch.randn(rows, width, device=device, dtype=dtype)
    weights = sum(p.nbytes for p in eager.parameters())
    products = 4.0 * rows * width * hidden
    return Problem(
        dlops=patched,
        eager=eager,
        args=(x,),
        bytes=(weights + 2 * x.nbytes, 3 * weights + 3 * x.nbytes),
        flops=(products, 3 * products),
    )
