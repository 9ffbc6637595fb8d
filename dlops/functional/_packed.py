"""Packed sequences: several of different lengths behind each other in one batch element."""

import torch
from torch import Tensor


def check_cu_seqlens(op: str, cu_seqlens: Tensor, x: Tensor, dim: int) -> None:
    """Check the values, where they can be read without waiting for a device; the kernels stay inside x, whose steps are
    its dimension ``dim``, in any case."""
    if type(cu_seqlens) is not Tensor or not cu_seqlens.is_cpu or torch.compiler.is_compiling():
        return
    if x.dim() <= dim:
        return  # the op's own check says so
    seqlen = x.shape[dim]
    bounds = cu_seqlens.flatten().tolist()
    if bounds and (bounds[0] != 0 or bounds[-1] != seqlen or bounds != sorted(bounds)):
        raise ValueError(f"{op}: cu_seqlens is {bounds}, accepted are numbers that do not decrease, from 0 to {seqlen}")
