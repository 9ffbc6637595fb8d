"""The linear recurrence h[t] = a[t] h[t-1] + b[t]. Letters: B batch, D channels, L steps."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import dlops.functional as D
from bench.case import Problem, case

SHAPES: dict[str, Any] = {
    "cpu": [(1, 1024, 2048)],
    "cuda": [(8, 2048, 4096)],
    "more_cpu": [(8, 256, 512), (1, 128, 32768)],
    "more_cuda": [(1, 2048, 131072)],
    "label": "B{} D{} L{}",
}


def loop(a: Tensor, b: Tensor) -> Tensor:
    h, steps = torch.zeros_like(b[..., 0]), []
    for a_t, b_t in zip(a.unbind(-1), b.unbind(-1), strict=True):
        h = torch.addcmul(b_t, a_t, h)
        steps.append(h)
    return torch.stack(steps, -1)


def doubling(a: Tensor, b: Tensor) -> Tensor:
    """Hillis and Steele's scan: log2(L) passes over memory."""
    seqlen, reach = b.shape[-1], 1
    while reach < seqlen:
        before = F.pad(b, (reach, 0))[..., :seqlen], F.pad(a, (reach, 0), value=1.0)[..., :seqlen]
        a, b = a * before[1], torch.addcmul(b, a, before[0])
        reach *= 2
    return b


def _problem(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], channels_last: bool) -> Problem:
    """Forward reads a and b and writes h; backward reads a, h and dh and writes da and db."""
    batch, dim, seqlen = shape
    a = torch.rand(batch, seqlen, dim, device=device).to(dtype).mT
    b = torch.randn(batch, seqlen, dim, device=device, dtype=dtype).mT
    a, b = (a, b) if channels_last else (a.contiguous(), b.contiguous())
    return Problem(
        dlops=D.linear_scan,
        eager=doubling,
        args=(a, b),
        bytes=(3 * a.nbytes, 8 * a.nbytes),
        flops=(2.0 * a.numel(), 6.0 * a.numel()),
        peers={"loop": loop},
    )


@case(**SHAPES)
def linear_scan(device: torch.device, dtype: torch.dtype, *shape: int) -> Problem:
    return _problem(device, dtype, shape, channels_last=False)


@case(**SHAPES | {"cpu": [], "more_cpu": SHAPES["cpu"] + SHAPES["more_cpu"]})
def linear_scan_channels_last(device: torch.device, dtype: torch.dtype, *shape: int) -> Problem:
    return _problem(device, dtype, shape, channels_last=True)
