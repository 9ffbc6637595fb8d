"""Triton's interpreter, quicker: its scans take Python's time for every element, and its calls of device functions
replace the members of ``triton.language`` once more each, which the launch has done already. And its sums add up in
halves, as a GPU's threads do; numpy's along an outer axis are one chain, which rounds more.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np


def _scan(self: Any, inputs: Any) -> list[Any]:
    """What every element combines with those before it along the axis, in log2 steps, each of twice the distance."""
    results = list(inputs)
    shape = results[0].handle.data.shape
    position = np.arange(shape[self.axis]).reshape([-1 if i == self.axis else 1 for i in range(len(shape))])
    distance = 1
    while distance < shape[self.axis]:
        before = [self.to_tensor(np.roll(x.handle.data, distance, self.axis), x.dtype) for x in results]
        combined = self.combine_fn.fn(*before, *results)
        if not isinstance(combined, tuple):
            combined = (combined,)
        results = [
            self.to_tensor(np.where(position >= distance, new.handle.data, old.handle.data), old.dtype)
            for new, old in zip(combined, results, strict=True)
        ]
        distance *= 2
    return results


def _sum(self: Any, x: Any) -> Any:
    whole = x.handle.data
    data = whole.reshape(-1) if self.axis is None else np.moveaxis(whole, self.axis, 0)
    while len(data) > 1:  # a power of two, as every extent of a block
        data = data[: len(data) // 2] + data[len(data) // 2 :]
    total = data[0]
    if self.keep_dims:
        total = np.expand_dims(total, tuple(range(whole.ndim)) if self.axis is None else self.axis)
    return self.to_tensor(total, x.dtype)


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """What a kernel calls a device function by."""
    from triton.runtime import interpreter

    used = [self.fn.__globals__.get(name) for name in ("tl", "core")]
    if any(language is not None and interpreter.tl.core.is_builtin(language.load) for language in used):
        interpreter._patch_lang(self.fn)
    try:
        return self.rewrite()(*args, **kwargs)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


@contextlib.contextmanager
def quick_interpreter() -> Iterator[None]:
    """The Triton kernels interpreted inside the block are interpreted sooner."""
    from triton.runtime import interpreter

    with (
        mock.patch.object(interpreter.ScanOps, "generic_scan", _scan),
        mock.patch.object(interpreter.ReduceOps, "sum", _sum),
        mock.patch.object(interpreter.InterpretedFunction, "__call__", _call),
    ):
        yield
