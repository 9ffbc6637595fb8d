"""Second stage of the deterministic column sums: adds the fp32 partials that programs left for their own row ranges.

P partial rows, N columns. One program owns BLOCK_N columns and adds their P partials in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .runtime import FP_FUSION, rounded

BLOCK_P, BLOCK_N, NUM_WARPS = 32, 64, 4


@triton.jit
def sum_rows(x, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Sum of x (ROWS, COLS) over its rows, in two levels: the error of a chain of additions grows with its length."""
    if ROWS > 8:
        x = tl.sum(tl.reshape(x, (ROWS // 8, 8, COLS)), 0)
    return tl.sum(x, 0)


@triton.jit(do_not_specialize=["P"])
def sum_partials_kernel(
    partials,  # (2 or 1, P, N) float32
    out0,  # (N,) sum of partials[0]
    out1,  # (N,) sum of partials[1], or None
    P,  # partial rows
    N,  # columns
    BLOCK_P: tl.constexpr,  # partial rows added at a time
    BLOCK_N: tl.constexpr,  # columns of one program
):
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    which = tl.program_id(1)
    partials += which.to(tl.int64) * P * N
    acc = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for start in range(0, P, BLOCK_P):
        rows = start + tl.arange(0, BLOCK_P)
        mask = (rows < P)[:, None] & (cols < N)[None, :]
        acc += tl.load(partials + rows.to(tl.int64)[:, None] * N + cols[None, :], mask=mask, other=0.0)
    total = sum_rows(acc, BLOCK_P, BLOCK_N)
    if out1 is None:
        tl.store(out0 + cols, rounded(total, out0.dtype.element_ty), mask=cols < N)
    else:
        if which == 0:
            tl.store(out0 + cols, rounded(total, out0.dtype.element_ty), mask=cols < N)
        else:
            tl.store(out1 + cols, rounded(total, out1.dtype.element_ty), mask=cols < N)


def sum_partials(partials: Tensor, count: int, dtype: torch.dtype) -> list[Tensor]:
    """The `count` (1 or 2) column sums of partials (count, P, N), rounded to dtype."""
    _, P, N = partials.shape
    outs = [torch.empty(N, dtype=dtype, device=partials.device) for _ in range(count)]
    sum_partials_kernel[(triton.cdiv(N, BLOCK_N), count)](
        partials,
        outs[0],
        outs[1] if count == 2 else None,
        P,
        N,
        BLOCK_P,
        BLOCK_N,
        num_warps=NUM_WARPS,
        enable_fp_fusion=FP_FUSION,
    )
    return outs
