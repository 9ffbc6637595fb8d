"""Checks of the memory that kernels touch.

:func:`guard` checks every access of an interpreted Triton kernel, :func:`poison` fills outputs before they are written.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

POISON = 0xFF  # every byte: NaN in every floating-point dtype
UNWRITTEN = -1  # the same in signed integers
ALLOCATORS = (
    (torch, ("empty", "empty_like", "empty_strided", "empty_permuted")),
    (Tensor, ("new_empty", "new_empty_strided")),
)
# A guarded pointer is its address plus BIAS, under the number of its argument, counted from 1, in the top byte: it
# stays the argument's however far arithmetic takes it, and no argument has a neighbour to run into.
TAG = 56
BIAS = 1 << (TAG - 1)


class OutOfBounds(IndexError):
    """A kernel accessed memory that its argument's shape and strides do not reach."""


@contextlib.contextmanager
def poison() -> Iterator[None]:
    """Fill what torch's Python functions allocate inside the block with POISON: an element left unwritten shows.

    What C++ allocates does not pass here; the allocator of tests/fence.cpp poisons it.
    """

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(allocate)
        def call(*args: Any, **kwargs: Any) -> Tensor:
            fresh = allocate(*args, **kwargs)
            fresh.untyped_storage().fill_(POISON)  # pyright: ignore[reportAttributeAccessIssue]: it has no stub
            return fresh

        return call

    with contextlib.ExitStack() as stack:
        for owner, names in ALLOCATORS:
            for name in names:
                stack.enter_context(mock.patch.object(owner, name, poisoned(getattr(owner, name))))
        yield


@contextlib.contextmanager
def guard() -> Iterator[None]:
    """Check every load, store, atomic and descriptor access of the Triton kernels interpreted inside the block.

    An access is inside if every byte of it belongs to an element of the argument that its pointer came from: what lies
    between the rows of a strided argument is outside. Lanes that are masked off access nothing.

    Raises:
        OutOfBounds: from the launch, naming the kernel, the argument and the offset in its elements.
    """
    from triton.runtime import interpreter

    if isinstance(interpreter._interpreter, _Checked):  # inside another guard
        yield
        return
    checked = _Checked(interpreter._interpreter, interpreter.interpreter_builder)

    class Executor(interpreter.GridExecutor):
        def _init_args_hst(self, args_dev: Any, kwargs: Any) -> Any:
            args, kwargs = super()._init_args_hst(args_dev, kwargs)
            checked.begin(self.fn.__name__)
            return (
                [checked.tag(name, a) for name, a in zip(self.arg_names, args, strict=False)],
                {name: checked.tag(name, a) for name, a in kwargs.items()},
            )

        def __call__(self, *args: Any, **kwargs: Any) -> None:
            fault = None
            try:
                super().__call__(*args, **kwargs)
            except interpreter.InterpreterError as error:  # one of them for each device function passed on the way
                fault = error
                while fault.__cause__ is not None:
                    fault = fault.__cause__
                if not isinstance(fault, OutOfBounds):
                    raise
            if fault is not None:
                raise fault

    with (
        mock.patch.object(interpreter, "GridExecutor", Executor),
        mock.patch.object(interpreter, "_interpreter", checked),
    ):
        yield


class _Argument:
    """A tensor argument of a launch, and which bytes from its base on are elements of it."""

    def __init__(self, name: str, tensor: Tensor, number: int) -> None:
        self.name, self.tensor = name, tensor
        self.base = (number << TAG) + BIAS + tensor.data_ptr()
        spans = [(size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
        self.bytes = (sum(spans) + 1) * tensor.itemsize if tensor.numel() else 0
        self.reached = None
        if not tensor.is_contiguous():
            self.reached = np.zeros(self.bytes, np.bool_)  # of which the system commits only the pages touched
            np.lib.stride_tricks.as_strided(
                self.reached,
                (*tensor.shape, tensor.itemsize),
                (*(stride * tensor.itemsize for stride in tensor.stride()), 1),
            )[...] = True

    def holds(self, offsets: np.ndarray, width: int) -> np.ndarray:
        """Which of the accesses to ``width`` bytes at these byte offsets are inside."""
        inside = (offsets >= 0) & (offsets <= self.bytes - width)
        if self.reached is not None:
            inside[inside] = self.reached[offsets[inside][:, None] + np.arange(width)].all(1)
        return inside

    def describe(self, offset: int) -> str:
        elements, rest = divmod(offset, self.tensor.itemsize)
        where = f"{elements}" if rest == 0 else f"{elements} and {rest} bytes"
        shape, strides = tuple(self.tensor.shape), self.tensor.stride()
        return f"offset {where} of argument {self.name}, {self.tensor.dtype} of shape {shape}, strides {strides}"


class _Checked:
    """The functions through which Triton's interpreter reaches memory, each with a check before the access."""

    def __init__(self, accesses: Any, builder: Any) -> None:
        self._accesses, self._builder = accesses, builder
        self._kernel = ""
        self._arguments: list[_Argument] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accesses, name)

    def begin(self, kernel: str) -> None:
        self._kernel, self._arguments = kernel, []

    def tag(self, name: str, value: Any) -> Any:
        """An argument of the launch with guarded pointers in place of its tensors' own."""
        from triton.runtime.jit import TensorWrapper
        from triton.tools.tensor_descriptor import TensorDescriptor

        if isinstance(value, TensorDescriptor):
            return dataclasses.replace(value, base=self.tag(name, value.base))
        if isinstance(value, tuple):
            values = [self.tag(f"{name}[{i}]", v) for i, v in enumerate(value)]
            return type(value)(*values) if hasattr(value, "_fields") else tuple(values)
        if not isinstance(value, (Tensor, TensorWrapper)):
            return value
        tensor = value.base if isinstance(value, TensorWrapper) else value
        argument = _Argument(name, tensor, len(self._arguments) + 1)
        self._arguments.append(argument)
        guarded = TensorWrapper(tensor, value.dtype)
        guarded.data_ptr = lambda: argument.base
        return guarded

    def load(self, pointers: np.ndarray, mask: np.ndarray, other: np.ndarray, dtype: np.dtype) -> np.ndarray:
        return self._accesses.load(self._addresses("load", pointers, mask, dtype), mask, other, dtype)

    def store(self, pointers: np.ndarray, value: np.ndarray, mask: np.ndarray) -> None:
        self._accesses.store(self._addresses("store", pointers, mask, value.dtype), value, mask)

    def atomic_rmw(self, op: Any, pointers: np.ndarray, value: np.ndarray, mask: np.ndarray, sem: Any) -> np.ndarray:
        return self._accesses.atomic_rmw(op, self._addresses("atomic", pointers, mask, value.dtype), value, mask, sem)

    def atomic_cas(self, pointers: np.ndarray, expected: np.ndarray, value: np.ndarray, sem: Any) -> np.ndarray:
        every = np.ones(pointers.shape, np.bool_)
        return self._accesses.atomic_cas(self._addresses("atomic", pointers, every, value.dtype), expected, value, sem)

    def _addresses(self, access: str, pointers: np.ndarray, mask: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """The addresses behind guarded pointers, of which those that the mask lets through have been checked."""
        live = pointers[np.asarray(mask)]  # Triton 3.6 passes a descriptor's mask as its buffer
        for number in np.unique(live >> TAG).tolist():
            of_argument = live[live >> TAG == number]
            if not 1 <= number <= len(self._arguments):
                self._fail(access, f"an address that comes from no argument ({of_argument[0]:#x})")
            argument = self._arguments[number - 1]
            offsets = (of_argument - np.uint64(argument.base)).astype(np.int64)
            outside = offsets[~argument.holds(offsets, dtype.itemsize)]
            if outside.size:
                self._fail(access, argument.describe(int(outside[0])))
        return (pointers & np.uint64((1 << TAG) - 1)) - np.uint64(BIAS)

    def _fail(self, access: str, what: str) -> None:
        raise OutOfBounds(f"{self._kernel}, program {self._builder.grid_idx}: {access} outside, at {what}")
