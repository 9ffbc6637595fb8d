"""Decoding steps, each on a state of its own. Letters: B batch, H heads, P channels of a head, N states, D channels,
W taps."""

import torch
import torch.nn.functional as F
from torch import Tensor

import dlops.functional as D
from bench.case import Problem, case


@case(
    cpu=[(1, 1, 1536, 16)],
    cuda=[(64, 1, 4096, 16)],
    more_cpu=[(16, 1, 1536, 16), (1, 24, 64, 128)],
    more_cuda=[(1, 1, 1536, 16), (64, 80, 64, 128)],
    small=(1, 1, 16, 16),
    label="B{} H{} P{} N{}",
    directions=("forward",),
)
def selective_state_update(device: torch.device, dtype: torch.dtype, *shape: int) -> Problem:
    """Reads A and the state, which it writes; all else is small."""
    batch, heads, channels, states = shape

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device=device, dtype=dtype)

    x, dt, z = (draw(batch, heads, channels) for _ in range(3))
    B, C = (draw(batch, 1, states) for _ in range(2))
    A = -torch.rand(heads, channels, states, device=device)
    skip, bias = (torch.randn(heads, channels, device=device) for _ in range(2))
    ours = torch.zeros(batch, heads, channels, states, device=device)
    theirs = ours.clone()

    def eager(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, skip: Tensor, z: Tensor, bias: Tensor) -> Tensor:
        step = F.softplus(dt + bias)[..., None]
        theirs.copy_(theirs * torch.exp(step * A) + step * x[..., None] * B[:, :, None])
        return (((theirs * C[:, :, None]).sum(-1) + skip * x) * F.silu(z)).to(x.dtype)

    return Problem(
        dlops=lambda *args: D.selective_state_update(ours, *args, dt_softplus=True),
        eager=eager,
        args=(x, dt, A, B, C, skip, z, bias),
        bytes=(A.nbytes + 2 * ours.nbytes, 0),
        flops=(6.0 * ours.numel(), 0),
    )


@case(
    cpu=[(1, 1536, 4)],
    cuda=[(64, 4096, 4)],
    more_cpu=[(16, 1536, 4)],
    more_cuda=[(1, 1536, 4)],
    small=(1, 16, 4),
    label="B{} D{} W{}",
    directions=("forward",),
)
def causal_conv1d_update(device: torch.device, dtype: torch.dtype, *shape: int) -> Problem:
    """Reads x, weight and the state, writes the state and y."""
    batch, dim, width = shape
    x, weight, bias = (
        torch.randn(*sizes, device=device, dtype=dtype) for sizes in ((batch, dim), (dim, width), (dim,))
    )
    ours = torch.zeros(batch, dim, width - 1, device=device, dtype=dtype)
    theirs = ours.clone()

    def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        joined = torch.cat([theirs, x[..., None]], 2)
        theirs.copy_(joined[..., 1:])
        return F.silu((joined * weight).sum(-1) + bias)

    return Problem(
        dlops=lambda x, weight, bias: D.causal_conv1d_update(x, ours, weight, bias, "silu"),
        eager=eager,
        args=(x, weight, bias),
        bytes=(2 * x.nbytes + weight.nbytes + 2 * ours.nbytes, 0),
        flops=(2.0 * weight.numel() * batch, 0),
    )
