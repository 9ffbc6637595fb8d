"""Kernels that fail the static gates, compiled without a GPU; prints what is found. Run by test_static.py.

In a process of its own: the tests' Triton kernels are interpreted, these must be compiled.
"""

import json
import sys
from pathlib import Path

import torch
import triton
import triton.language as tl

sys.path.append(str(Path(__file__).parent.parent))  # for bench; the last, since dlops may be installed elsewhere

from bench.static import jit
from bench.static.chip import CHIPS


@triton.jit
def copy_kernel(x, y, WIDTH: tl.constexpr, STEP_X: tl.constexpr, STEP_Y: tl.constexpr):
    cols = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    tl.store(y + STEP_Y * cols, tl.load(x + STEP_X * cols))


@triton.jit
def product_kernel(x, y, z, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    at = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(4):
        a, b = tl.load(x + k * BLOCK * BLOCK + at), tl.load(y + k * BLOCK * BLOCK + at)
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=PRECISION)
    tl.store(z + at, acc)


def faults() -> None:
    x = torch.empty(2**16)
    copy_kernel[(4,)](x, x, 4096, 1, 1)
    copy_kernel[(4,)](x[1:], x, 4096, 1, 1)  # not aligned
    copy_kernel[(4,)](x, x, 4096, 2, 1)
    copy_kernel[(4,)](x, x, 4096, 1, 2)
    product_kernel[(1,)](x, x, x, 64, "tf32", num_stages=1, maxnreg=32)
    product_kernel[(1,)](x, x, x, 128, "tf32", num_warps=8)
    half = torch.empty(2**16, dtype=torch.bfloat16)
    product_kernel[(1,)](half, half, x, 32, "ieee", num_stages=1)


def products() -> None:
    x = torch.empty(2**16)
    for block, precision in ((64, "tf32"), (32, "tf32"), (32, "ieee")):
        product_kernel[(1,)](x, x, x, block, precision, num_stages=1)


if __name__ == "__main__":
    found = jit.record(faults, CHIPS[80])
    for chip in CHIPS.values():
        found += jit.record(products, chip)
    for launch in found:
        print(json.dumps(jit.compiled(launch)), flush=True)
