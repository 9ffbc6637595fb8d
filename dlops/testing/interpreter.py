"""Triton's interpreter with scans of whole tensors: its own take Python's time for every element."""

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


@contextlib.contextmanager
def whole_scans() -> Iterator[None]:
    """``tl.associative_scan`` of the kernels interpreted inside the block works on whole tensors."""
    from triton.runtime import interpreter

    with mock.patch.object(interpreter.ScanOps, "generic_scan", _scan):
        yield
