"""The scan of Mamba-2. Letters: B batch, L steps, H heads, P channels of a head, N state, one group."""

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import dlops.functional as D
from bench.case import Problem, case, importable

SHAPES: dict[str, Any] = {
    "cpu": [(1, 1024, 24, 64, 128)],
    "cuda": [(8, 4096, 64, 64, 128)],
    "more_cpu": [(1, 8192, 24, 64, 128), (4, 512, 8, 64, 64)],
    "more_cuda": [(1, 131072, 64, 64, 128)],
    "label": "B{} L{} H{} P{} N{}",
}
CHUNK = 256  # Mamba-2's default; shorter where it is faster


def chunked(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk: int) -> Tensor:
    """The paper's chunked form (section 6) in torch, seqlen a multiple of the chunk."""
    dtype = x.dtype
    x, dt = (t.unflatten(1, (-1, chunk)) for t in ((x * dt[..., None]).to(dtype), dt))
    B, C = (t[:, :, 0].unflatten(1, (-1, chunk)) for t in (B, C))
    cum = (dt * A).cumsum(2).permute(0, 1, 3, 2)  # (batch, chunks, heads, chunk)
    causal = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()
    decay = (cum[..., :, None] - cum[..., None, :]).masked_fill(~causal, -math.inf).exp().to(dtype)
    x = x.transpose(2, 3)  # (batch, chunks, heads, chunk, headdim)
    y = ((C @ B.mT)[:, :, None] * decay) @ x
    update = (x * (cum[..., -1:] - cum).exp().to(dtype)[..., None]).mT @ B[:, :, None]
    state, states = torch.zeros_like(update[:, 0]), []
    for rate, new in zip(cum[..., -1].exp().unbind(1), update.unbind(1), strict=True):
        states.append(state.to(dtype))
        state = rate[..., None, None] * state + new
    y = y + cum.exp().to(dtype)[..., None] * (C[:, :, None] @ torch.stack(states, 1).mT)
    return y.transpose(2, 3).flatten(1, 2)


@case(**SHAPES)
def ssd_scan(device: torch.device, dtype: torch.dtype, *shape: int) -> Problem:
    """Forward reads x and writes y; backward reads x and dy and writes dx. FLOPs are those of the recurrence."""
    batch, seqlen, heads, headdim, dstate = shape
    x = torch.randn(batch, seqlen, heads, headdim, device=device, dtype=dtype)
    dt = F.softplus(torch.randn(batch, seqlen, heads, device=device) - 4)
    A = -torch.rand(heads, device=device) * 15 - 1
    B, C = (torch.randn(batch, seqlen, 1, dstate, device=device, dtype=dtype) for _ in range(2))
    package = importable("mamba_ssm.ops.triton.ssd_combined:mamba_chunk_scan_combined") if x.is_cuda else None
    work = x.numel() * dstate
    return Problem(
        dlops=D.ssd_scan,
        eager=partial(chunked, chunk=CHUNK),
        args=(x, dt, A, B, C),
        bytes=(2 * x.nbytes, 5 * x.nbytes),
        flops=(5.0 * work, 15.0 * work),
        peers={
            "chunks of 64": partial(chunked, chunk=64),
            **({"mamba_ssm": partial(package, chunk_size=CHUNK)} if package else {}),
        },
    )
