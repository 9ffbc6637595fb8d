"""What ops over (batch, channels, seqlen) return: tensors contiguous or channels-last, gradients that are asked for."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def channels_last(x: Tensor) -> bool:
    """Whether ``x`` (batch, channels, seqlen) has its channels, not its steps, next to each other."""
    return x.stride(1) == 1 and x.stride(2) != 1


def in_layout_of(y: Tensor, x: Tensor) -> Tensor:
    """``y``, of ``x``'s shape, copied to dense memory: channels-last if ``x`` is, else contiguous."""
    if channels_last(x):
        return y.mT.clone(memory_format=torch.contiguous_format).mT
    return y.clone(memory_format=torch.contiguous_format)


def empty_in_layout_of(x: Tensor) -> Tensor:
    """An uninitialised tensor of ``x``'s shape and dtype: channels-last if ``x`` is, else contiguous."""
    batch, channels, seqlen = x.shape
    return x.new_empty(batch, seqlen, channels).mT if channels_last(x) else x.new_empty(x.shape)


def asked_for(gradients: Sequence[Tensor], x: Tensor, output_mask: Sequence[bool]) -> Any:
    """The gradients, of those not asked for an empty tensor in ``x``'s dtype."""
    return tuple(g if asked else x.new_empty(0) for g, asked in zip(gradients, output_mask, strict=True))
