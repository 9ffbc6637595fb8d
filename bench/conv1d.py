"""Causal depthwise convolution with silu. Letters: B batch, D channels, L steps, W taps."""

from typing import Any

import torch
import torch.nn.functional as F

import dlops.functional as D
from bench.case import Problem, case, importable

SHAPES: dict[str, Any] = {
    "cpu": [(1, 1536, 1024, 4)],
    "cuda": [(8, 4096, 4096, 4)],
    "more_cpu": [(8, 768, 512, 4), (1, 256, 16384, 4), (4, 64, 1024, 31)],
    "more_cuda": [(1, 1536, 131072, 4), (64, 2048, 512, 3)],
    "small": (1, 16, 16, 4),
    "label": "B{} D{} L{} W{}",
}


def _problem(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], channels_last: bool) -> Problem:
    """Forward reads x and writes y; backward reads x and dy and writes dx."""
    batch, dim, seqlen, width = shape
    x = torch.randn(batch, seqlen, dim, device=device, dtype=dtype).mT
    x = x if channels_last else x.contiguous()
    weight = torch.randn(dim, width, device=device, dtype=dtype) / width**0.5
    bias = torch.randn(dim, device=device, dtype=dtype)
    package = importable("causal_conv1d:causal_conv1d_fn") if x.is_cuda and 2 <= width <= 4 else None
    return Problem(
        dlops=lambda x, weight, bias: D.causal_conv1d(x, weight, bias, "silu"),
        eager=lambda x, weight, bias: F.silu(
            F.conv1d(x, weight[:, None], bias, padding=width - 1, groups=dim)[..., :seqlen]
        ),
        args=(x, weight, bias),
        bytes=(2 * x.nbytes, 5 * x.nbytes),
        flops=(2.0 * x.numel() * width, 6.0 * x.numel() * width),
        peers={"causal_conv1d": lambda x, w, b: package(x, w, b, activation="silu")} if package else {},
    )


@case(**SHAPES)
def causal_conv1d(device: torch.device, dtype: torch.dtype, *shape: int) -> Problem:
    return _problem(device, dtype, shape, channels_last=False)


@case(**{**SHAPES, "small": None})
def causal_conv1d_channels_last(device: torch.device, dtype: torch.dtype, *shape: int) -> Problem:
    return _problem(device, dtype, shape, channels_last=True)
