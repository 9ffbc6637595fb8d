"""The Triton kernels where their tables and launchers turn: several tiles, groups and runs, by pointers and TMA."""

from typing import Any

import pytest
import torch
from dlops.kernels import linear as kernels
from dlops.kernels.linear_tiles import EPILOGUE_BYTES, GROUP_M, Tile
from dlops.kernels.reduction import BLOCK_N, BLOCK_P, sum_partials
from torch import Tensor

from dlops import backend, testing
from dlops._op import Op
from dlops.ops import linear
from dlops.testing import Make
from dlops.testing.guard import poison

pytestmark = pytest.mark.skipif(backend.missing("triton") is not None, reason=str(backend.missing("triton")))

NARROW = Tile(16, 16, 16, 4, 2, 1)
WIDE = NARROW._replace(block_n=EPILOGUE_BYTES.value)  # the epilogues take it half at a time, of float32 a quarter
ROWS = NARROW.block_m * GROUP_M + 1  # one row of tiles more than a group, with one row in it


def check(op: Op, outputs: tuple[Tensor, ...], args: list[Any]) -> None:
    """The contract's error ratio, of outputs that a launcher made."""
    double = [a.double() if isinstance(a, Tensor) else a for a in args]
    for y, yd, y64 in zip(outputs, op.definition(*args), op.definition(*double), strict=True):
        if y.is_floating_point():
            assert max(testing.error_ratio(y, yd, y64)) <= testing.RATIO
        else:
            torch.testing.assert_close(y, yd)


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_linear_of_many_tiles(dtype: torch.dtype, tma: bool, device: str) -> None:
    make = Make(dtype, device)
    x, weight, up, deep = make(ROWS, 32), make(40, 32), make(40, 32), make(120, 32)
    calls: list[tuple[Op, Any, list[Any]]] = [
        (linear.linear_act, kernels.linear_act, [x, weight, make(40), "silu", [], True]),
        (linear.gated_linear, kernels.gated_linear, [x, weight, up, make(40), make(40), "silu", [], True]),
        (linear.maxout_linear, kernels.maxout_linear, [x, deep, make(120), 3]),
    ]
    for op, launch, args in calls:
        check(op, launch(*args, tile=NARROW, tma=tma), args)


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_linear_of_wide_tiles(dtype: torch.dtype, tma: bool, device: str) -> None:
    make = Make(dtype, device)
    for N in (WIDE.block_n - 8, WIDE.block_n + 8):
        x, weight, bias, up, bias_up = make(17, 32), make(N, 32), make(N), make(N, 32), make(N)
        args = [x, weight, bias, "gelu", [], True]
        check(linear.linear_act, kernels.linear_act(*args, tile=WIDE, tma=tma), args)
        args = [x, weight, up, bias, bias_up, "silu", [], True]
        check(linear.gated_linear, kernels.gated_linear(*args, tile=WIDE, tma=tma), args)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 2])
def test_sum_partials_of_several_runs(count: int, dtype: torch.dtype, device: str) -> None:
    partials = torch.randn(count, 2 * BLOCK_P + 1, BLOCK_N + 2, device=device)
    with poison():
        found = sum_partials(partials, count, dtype)
    for out, partial in zip(found, partials, strict=True):
        torch.testing.assert_close(out, partial.double().sum(0).to(dtype))
