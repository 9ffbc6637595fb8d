"""Triton's memory checks are checked: planted faults are caught and named, correct kernels pass."""

import pytest
import torch
import triton
import triton.language as tl
from dlops.kernels import linear as kernels
from dlops.kernels.linear_tiles import Tile
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dlops import backend, testing
from dlops.ops import linear
from dlops.testing.guard import OutOfBounds

interpreted = pytest.mark.skipif(not backend.triton_interpreted(), reason="Triton's interpreter is off")


# ---- accesses: the fixture `guarded` of conftest.py is around every test ---------------------------------------------


@triton.jit
def load_from(pointers, mask):
    return tl.load(pointers, mask=mask)


@triton.jit
def touch_kernel(x, neighbour, start, step, count, N: tl.constexpr, ACCESS: tl.constexpr):
    """Accesses `count` elements of x: `start` and each `step` after the one before."""
    lanes = tl.arange(0, N)
    pointers = x + (start + lanes * step)
    mask = lanes < count
    if ACCESS == "load":
        load_from(pointers, mask)
    elif ACCESS == "store":
        tl.store(pointers, lanes.to(tl.float32), mask=mask)
    elif ACCESS == "atomic_add":
        tl.atomic_add(pointers, 1.0, mask=mask)
    elif ACCESS == "atomic_cas":
        tl.atomic_cas(x + start, 0.0, 1.0)
    else:
        tl.load(start.to(tl.int64).to(tl.pointer_type(tl.float32), bitcast=True))


@triton.jit
def touch_block_kernel(x, ROWS: tl.constexpr, COLS: tl.constexpr, STORE: tl.constexpr):
    """Accesses the first block of the descriptor x."""
    if STORE:
        x.store([0, 0], tl.zeros((ROWS, COLS), tl.float32))
    else:
        x.load([0, 0])


def touch(x: Tensor, access: str, start: int, step: int = 1, count: int = 1, neighbour: Tensor | None = None) -> None:
    touch_kernel[(1,)](x, neighbour, start, step, count, 16, access)


@interpreted
@pytest.mark.parametrize("access", ["load", "store", "atomic_add", "atomic_cas"])
def test_accesses_outside_an_argument(access: str) -> None:
    what = access.partition("_")[0]
    x, neighbour = torch.zeros(24)[8:].split(8)  # every fault but the last lands in memory that is there
    touch(x, access, 0, count=8, neighbour=neighbour)
    for start in (-1, 8, 10**6):
        message = rf"touch_kernel, program \(0, 0, 0\): {what} outside, at offset {start} of argument x, torch.float32 "
        with pytest.raises(OutOfBounds, match=message + r"of shape \(8,\), strides \(1,\)"):
            touch(x, access, start, neighbour=neighbour)
    rows = torch.zeros(4, 10)[:, :8]
    touch(rows, access, 30, count=8)
    for start in (8, 9, 19, 38):
        with pytest.raises(OutOfBounds, match=rf"{what} outside, at offset {start} of argument x, .*\(10, 1\)"):
            touch(rows, access, start)


@interpreted
@pytest.mark.parametrize("store", [False, True])
def test_descriptors_of_more_than_their_tensor(store: bool) -> None:
    whole = torch.zeros(6, 12)
    rows = whole[1:5, :8]

    def block(base: Tensor, shape: list[int]) -> None:
        touch_block_kernel[(1,)](TensorDescriptor(base, shape, [12, 1], [8, 16]), 8, 16, store)

    block(rows, [4, 8])  # the block reaches past the tensor; what the descriptor does not describe is masked off
    for shape, offset in [([5, 8], 48), ([4, 9], 8)]:
        with pytest.raises(OutOfBounds, match=rf"touch_block_kernel.* outside, at offset {offset} of argument x, "):
            block(rows, shape)


@interpreted
def test_one_lane_outside_is_enough_and_masked_lanes_access_nothing() -> None:
    x = torch.zeros(24)[:8]
    touch(x, "load", 7, step=-1, count=8)
    touch(x, "load", 0, step=10**6, count=1)
    touch(x, "load", 10**6, count=0)
    with pytest.raises(OutOfBounds, match="at offset 8 of argument x"):
        touch(x, "load", 0, count=9)
    with pytest.raises(OutOfBounds, match="at offset -2147483648 of argument x"):  # 2^31 in 32 bits
        touch(x, "load", 1, step=2**31 - 1, count=2)
    with pytest.raises(OutOfBounds, match=r"load outside, at an address that comes from no argument \(0x1000\)"):
        touch(x, "address", 0x1000)


@interpreted
def test_accesses_narrower_and_wider_than_an_element() -> None:
    @triton.jit
    def halves_kernel(x, start):
        tl.load(x.to(tl.pointer_type(tl.int16)) + start)

    x = torch.zeros(4)[:3]
    for start in (0, 5):
        halves_kernel[(1,)](x, start)
    with pytest.raises(OutOfBounds, match="at offset 3 of argument x"):
        halves_kernel[(1,)](x, 6)


@interpreted
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_linear_kernels_through_descriptors_and_pointers(dtype: torch.dtype) -> None:
    x, weight, up = (torch.randn(size, 40, dtype=dtype)[:, :24] for size in (19, 40, 40))
    deep = torch.randn(40, 32, dtype=dtype)
    for launch, args in [
        (kernels.linear_act, (x, weight, None, "silu", [], True)),
        (kernels.gated_linear, (x, weight, up, None, None, "silu", [], True)),
        (kernels.maxout_linear, (x[:, :16], deep[:, :16], None, 5)),
    ]:
        described, pointed = (launch(*args, tile=Tile(16, 16, 16, 4, 2, 1), tma=tma) for tma in (True, False))
        for a, b in zip(described, pointed, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


# ---- unwritten elements --------------------------------------------------------------------------------------------


@triton.jit
def double_kernel(x, y, index, count_y, count_index, N: tl.constexpr):
    lanes = tl.arange(0, N)
    value = tl.load(x + lanes, mask=lanes < count_y).to(tl.float32)
    tl.store(y + lanes, (2 * value).to(y.dtype.element_ty), mask=lanes < count_y)
    tl.store(index + lanes, tl.zeros((N,), tl.int64), mask=lanes < count_index)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_elements_left_unwritten(dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    left = {"y": 0, "index": 0}

    def maxout_linear(x: Tensor, weight: Tensor, bias: None, num_pieces: int) -> tuple[Tensor, Tensor]:
        y, index = torch.empty_like(x), x.new_empty(x.shape, dtype=torch.int64)
        double_kernel[(1,)](x, y, index, x.numel() - left["y"], x.numel() - left["index"], 16)
        return y, index

    op = linear.maxout_linear
    monkeypatch.setitem(op.implementations, "triton", backend.Implementation(lambda: maxout_linear, lambda *args: None))
    monkeypatch.setattr(backend, "_loaded", backend._loaded.__wrapped__)  # which remembers the kernel itself
    args = torch.randn(3, 5, device=device, dtype=dtype), 2 * torch.eye(5, device=device, dtype=dtype), None, 1
    testing.check_ratios(op, [args], "triton")
    left["y"] = 1
    with pytest.raises(AssertionError, match="1 of 15 elements are NaN, the definition's are not"):
        testing.check_ratios(op, [args], "triton")
    left["y"], left["index"] = 0, 1
    with pytest.raises(AssertionError, match="maxout_linear on triton: 1 of 15 elements of index were not written"):
        testing.check_ratios(op, [args], "triton")
