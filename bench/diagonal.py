"""S4D's convolution kernel. Letters: D channels, N states, L steps."""

import torch
from torch import Tensor

import dlops.functional as D
from bench.case import Problem, case


def vandermonde(A: Tensor, C: Tensor, dt: Tensor, seqlen: int) -> Tensor:
    """All D x N x L powers at once."""
    exponent = dt[:, None] * A
    factor = C * (torch.exp(exponent) - 1) / A
    powers = torch.exp(exponent[..., None] * torch.arange(seqlen, device=A.device))
    return 2 * (factor[..., None] * powers).sum(1).real


@case(
    cpu=[(128, 32, 2048)],
    cuda=[(1024, 32, 16384)],
    more_cpu=[(64, 32, 16384)],
    label="D{} N{} L{}",
)
def s4d_kernel(device: torch.device, dtype: torch.dtype, *shape: int) -> Problem:
    """Reads A, C and dt and writes the kernel, all in float32."""
    dim, dstate, seqlen = shape
    A = torch.complex(torch.full((dim, dstate), -0.5), torch.pi * torch.arange(dstate).expand(dim, dstate)).to(device)
    C = torch.randn(dim, dstate, dtype=torch.complex64, device=device)
    dt = torch.rand(dim, device=device) * 0.1 + 1e-3
    size = 4.0 * dim * seqlen
    return Problem(
        dlops=lambda A, C, dt: D.s4d_kernel(A, C, dt, seqlen),
        eager=lambda A, C, dt: vandermonde(A, C, dt, seqlen),
        args=(A, C, dt),
        bytes=(size, 2 * size),
        flops=(4.0 * dim * dstate * seqlen, 12.0 * dim * dstate * seqlen),
        compile=device.type != "cpu",  # complex arithmetic is not fused: the eager time, after a minute
    )
