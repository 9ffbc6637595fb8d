"""The two memory layouts of (batch, channels, seqlen) tensors that ops keep: contiguous, and channels-last."""

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
