"""Triton's interpreter, quicker: its scans take Python's time for every element, and its calls of device functions
replace the members of ``triton.language`` once more each, which the launch has done already.
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
    """The Triton kernels interpreted inside the block are interpreted sooner, to the same results."""
    from triton.runtime import interpreter

    with (
        mock.patch.object(interpreter.ScanOps, "generic_scan", _scan),
        mock.patch.object(interpreter.InterpretedFunction, "__call__", _call),
    ):
        yield
