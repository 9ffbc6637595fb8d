"""Argument checks shared by the ops: the exceptions name the argument, what came and what is accepted."""

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})


def check_tensors(op: str, x: Tensor, **others: Tensor | None) -> None:
    """Every tensor is floating point and shares ``x``'s dtype and device; ``x`` has at least one dimension."""
    dtype, index, cpu = x.dtype, x.get_device(), x.is_cpu
    if dtype not in FLOATING:
        raise RuntimeError(f"{op}: x has dtype {dtype}, accepted are float32, bfloat16, float16 and float64")
    if x.dim() == 0:
        raise RuntimeError(f"{op}: x is 0-dimensional, accepted is a tensor of at least one dimension")
    for name, other in others.items():
        if other is None:
            continue
        if other.dtype != dtype:
            raise RuntimeError(f"{op}: {name} has dtype {other.dtype}, accepted is x's, {dtype}")
        if other.get_device() != index or other.is_cpu != cpu:
            raise RuntimeError(f"{op}: {name} is on {other.device}, accepted is x's device, {x.device}")


def check_shape(op: str, name: str, tensor: Tensor | None, accepted: torch.Size) -> None:
    """``tensor``, if given, has exactly the shape ``accepted``."""
    if tensor is not None and tensor.shape != accepted:
        raise RuntimeError(f"{op}: {name} has shape {tuple(tensor.shape)}, accepted is {tuple(accepted)}")


def check_eps(op: str, eps: float) -> None:
    if not hasattr(eps, "__float__"):
        raise TypeError(f"{op}: eps is {eps!r}, accepted is a number")
    if not eps >= 0:
        raise ValueError(f"{op}: eps is {eps}, accepted are numbers >= 0")


class Arguments:
    """Compares the arguments of one call: each message has the name, what came and what is accepted."""

    def __init__(self, op: str, first: str, tensor: Tensor) -> None:
        self.op, self.first, self.tensor = op, first, tensor

    def check(
        self,
        name: str,
        tensor: Tensor | None,
        dtype: torch.dtype | tuple[torch.dtype, ...],
        *accepted: tuple[str, Sequence[int]],
    ) -> None:
        """``tensor``, if given, has the dtype or one of them, one of the accepted (named) shapes and the first
        argument's device."""
        if tensor is None:
            return
        if not any(tensor.shape == torch.Size(shape) for _, shape in accepted):
            shapes = " or ".join(f"{names} = {tuple(shape)}" for names, shape in accepted)
            raise RuntimeError(f"{self.op}: {name} has shape {tuple(tensor.shape)}, accepted is {shapes}")
        dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
        if tensor.dtype not in dtypes:
            names = " or ".join(map(str, dict.fromkeys(dtypes)))
            raise RuntimeError(
                f"{self.op}: {name} has dtype {tensor.dtype}, accepted is {names} with {self.first} of dtype "
                f"{self.tensor.dtype}"
            )
        if tensor.device != self.tensor.device:
            raise RuntimeError(
                f"{self.op}: {name} is on {tensor.device}, accepted is {self.first}'s device, {self.tensor.device}"
            )

    def sequences(self, batch: int, cu_seqlens: Tensor | None) -> tuple[str, int]:
        """What the first dimension of the states is called, and its size; checks cu_seqlens, if given."""
        if cu_seqlens is None:
            return "batch", batch
        if batch != 1:
            raise RuntimeError(
                f"{self.op}: {self.first} has batch {batch}, accepted is 1 with cu_seqlens (packed sequences)"
            )
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
            raise RuntimeError(
                f"{self.op}: cu_seqlens has shape {tuple(cu_seqlens.shape)}, accepted is (num_sequences + 1,)"
            )
        self.check("cu_seqlens", cu_seqlens, torch.int32, ("(num_sequences + 1,)", cu_seqlens.shape))
        return "num_sequences", cu_seqlens.shape[0] - 1
