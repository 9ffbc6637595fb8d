"""The selective scan. Letters: B batch, D channels, L steps, N states. Bound by its B D L N exponentials."""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import dlops.functional as D
from bench import measure
from bench.case import Problem, case

CSRC = Path(__file__).parent.parent / "csrc"


def plain(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, skip: Tensor, z: Tensor, delta_bias: Tensor
) -> Tensor:
    """As one writes it in torch: all decays and inputs at once, (L, B, D, N) each, then a loop over the steps."""
    delta = F.softplus(delta + delta_bias[:, None])
    decays = torch.exp(torch.einsum("bdl,dn->lbdn", delta, A))
    inputs = torch.einsum("bdl,bnl->lbdn", delta * u, B.to(A.dtype))
    h, ys = torch.zeros_like(inputs[0]), []
    for decay, x, c in zip(decays.unbind(), inputs.unbind(), C.to(A.dtype).unbind(-1), strict=True):
        h = decay * h + x
        ys.append(torch.einsum("bdn,bn->bd", h, c))
    return ((torch.stack(ys, -1) + skip[:, None] * u) * F.silu(z)).to(u.dtype)


def ours(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, skip: Tensor, z: Tensor, delta_bias: Tensor
) -> Tensor:
    y = D.selective_scan(u, delta, A, B, C, skip, z, delta_bias, delta_softplus=True)
    assert isinstance(y, Tensor)
    return y


@case(
    cpu=[(1, 1536, 1024, 16)],
    more_cpu=[(1, 1536, 256, 16), (1, 1536, 4096, 16), (8, 256, 512, 16), (1, 512, 1024, 64)],
    more_cuda=[(8, 4096, 4096, 16), (1, 1536, 131072, 16)],
    small=(1, 16, 16, 4),
    label="B{} D{} L{} N{}",
)
def selective_scan(device: torch.device, dtype: torch.dtype, batch: int, dim: int, seqlen: int, dstate: int) -> Problem:
    """Forward reads u, delta, z, B and C and writes y; backward reads them and dy, and writes their gradients."""

    def arguments(dstate: int) -> tuple[Tensor, ...]:
        per_step = (torch.randn(batch, seqlen, dim, device=device, dtype=dtype).mT for _ in range(3))
        u, delta, z = per_step
        B, C = (torch.randn(batch, seqlen, dstate, device=device, dtype=dtype).mT for _ in range(2))
        A = -torch.arange(1.0, dstate + 1, device=device).repeat(dim, 1)
        skip, delta_bias = torch.ones(dim, device=device), torch.full((dim,), -4.0, device=device)
        return u, delta, A, B, C, skip, z, delta_bias

    args = arguments(dstate)
    u, B, elements = args[0], args[3], batch * dim * seqlen * dstate

    def note() -> str:
        with torch.no_grad():
            text = _beside_exponentials(functools.partial(ours, *args), elements) if u.is_cpu else ""
        peaks = {n: _peak_with_backward(arguments(n), device.type) / 1e6 for n in (16, 64, 256)}
        return f"{text}peak MB of forward and backward, by N: {', '.join(f'{n}: {mb:.0f}' for n, mb in peaks.items())}"

    return Problem(
        dlops=ours,
        eager=plain,
        args=args,
        bytes=(4 * u.nbytes + 2 * B.nbytes, 11 * u.nbytes + 6 * B.nbytes),
        flops=(7.0 * elements, 26.0 * elements),
        compile=False,
        note=note,
    )


def _peak_with_backward(args: tuple[Tensor, ...], device: str) -> int:
    leaves = [a.requires_grad_() for a in args]
    with torch.enable_grad():
        return measure.peak_memory(lambda: torch.autograd.grad(ours(*leaves).sum(), leaves), device)


def _beside_exponentials(call: Callable[[], Any], elements: int) -> str:
    """How much longer than its exponentials alone the call takes."""
    threads = torch.get_num_threads()
    if shutil.which("c++") is None:
        return "no c++ to compile the exponentials alone with; "
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(threads) as pool:
        path = f"{folder}/exp2.so"
        flags = ["-O3", "-march=native", "-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC"]
        source = Path(__file__).with_name("exp2.cpp")
        subprocess.run(["c++", *flags, "-DDLOPS_ISA=native", f"-I{CSRC}", source, "-o", path], check=True)
        library = ctypes.CDLL(path)
        library.elements_of_a_step.restype = ctypes.c_int64
        steps = -(-elements // library.elements_of_a_step() // threads)
        delta, rate = torch.rand(64 * 16), -torch.rand(4 * 16)
        outs = [torch.empty(64 * 4 * 16) for _ in range(threads)]

        def part(out: Tensor) -> None:
            pointers = (ctypes.c_void_p(x.data_ptr()) for x in (delta, rate))
            library.exponentials(*pointers, ctypes.c_int64(steps), ctypes.c_void_p(out.data_ptr()))

        samples = measure.rounds({"scan": call, "exp2": lambda: list(pool.map(part, outs))}, "cpu", 2.0)
    ms, ratio = measure.median(samples["exp2"]), measure.paired(samples["scan"], samples["exp2"])
    return f"its exponentials alone, by {threads} threads: {ms:.2f} ms, the forward takes {ratio:.2f}x of it; "
