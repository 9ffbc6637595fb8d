"""What every launcher asks about the machine: interpreter or GPU, architecture, number of SMs, layout of rows."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALL_REGISTERS = 255  # of a thread, of at most 8 warps: by itself the compiler spills a few to fit one more block
FP_FUSION = True  # a*b+c is one rounding, on every Triton version and whatever its default


@triton.jit
def _probe():
    pass


# True when TRITON_INTERPRET was set as these kernels were decorated, which is what decides how they run.
INTERPRETED = tl.constexpr(not isinstance(_probe, triton.runtime.JITFunction))


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 x in dtype, to the nearest, ties to even. The interpreter's own conversion to bfloat16 truncates."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, bits + ((bits >> 16) & 1) + 0x7FFF, 0x7FC00000)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


class Device(NamedTuple):
    arch: int  # 10 * major + minor of the compute capability
    num_sms: int


# What launches on tensors of no GPU are configured for. The interpreter: few SMs, so that persistent loops take several
# turns on small tests. Whoever compiles for a chip that is not there says which.
offline = Device(arch=90, num_sms=4)


@functools.cache
def _cuda_device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    return Device(10 * properties.major + properties.minor, properties.multi_processor_count)


def device_of(x: Tensor) -> Device:
    """The architecture and number of SMs that a launch on x's device is configured for."""
    return _cuda_device(x.get_device()) if x.is_cuda else offline


def on_device(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """Makes the device of the launcher's first tensor current while it runs: Triton launches on the current device."""

    @functools.wraps(launcher)
    def launch(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if x.is_cuda and x.get_device() != torch.cuda.current_device():
            with torch.cuda.device(x.get_device()):
                return launcher(x, *args, **kwargs)
        return launcher(x, *args, **kwargs)

    return launch


def as_rows(x: Tensor, width: int) -> tuple[Tensor, int]:
    """x as rows of `width` adjacent elements, and the distance between rows; copies only what is not so already."""
    if x.is_contiguous():
        return x, width
    x = x.reshape(-1, width)
    if width > 1 and x.stride(1) != 1:
        return x.contiguous(), width
    return x, x.stride(0)


def empty_in_layout_of(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor of x's shape, and dtype if not another: channels-last if x (batch, dim, steps) is, else
    contiguous."""
    batch, dim, steps = x.shape
    dtype = dtype or x.dtype
    if x.stride(1) == 1 and x.stride(2) != 1:
        return torch.empty(batch, steps, dim, dtype=dtype, device=x.device).mT
    return torch.empty(x.shape, dtype=dtype, device=x.device)


def unsupported(op: str, *args: Any) -> str | None:
    """Why these arguments cannot be served by any kernel of this package, or None."""
    for x in args:
        if isinstance(x, Tensor) and x.is_floating_point() and x.dtype not in DTYPES:
            return f"{op}: the Triton kernels take float32, bfloat16 and float16, not {str(x.dtype)[6:]}"
    x = next((a for a in args if isinstance(a, Tensor)), None)
    if x is None or x.is_cuda or (INTERPRETED and x.device.type == "cpu"):
        return None
    hint = " (set TRITON_INTERPRET=1 before importing triton to interpret them)" if x.device.type == "cpu" else ""
    return f"{op}: the Triton kernels run on CUDA devices, not on {x.device.type}{hint}"
