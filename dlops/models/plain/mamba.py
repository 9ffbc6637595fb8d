"""Mamba in plain torch.nn: the scan is a loop over steps."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MambaMixer(nn.Module):
    """Projection, causal convolution, selective scan, gate and projection."""

    def __init__(
        self, d_model: int, d_state: int = 16, d_conv: int = 4, expand: int = 2, dt_rank: int | None = None
    ) -> None:
        super().__init__()
        self.d_inner, self.d_state = expand * d_model, d_state
        self.dt_rank = math.ceil(d_model / 16) if dt_rank is None else dt_rank
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=False)
        self.conv1d = nn.Conv1d(self.d_inner, self.d_inner, d_conv, groups=self.d_inner, padding=d_conv - 1)
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner)
        self.A_log = nn.Parameter(torch.arange(1, d_state + 1).log().repeat(self.d_inner, 1))
        self.D = nn.Parameter(torch.ones(self.d_inner))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        u, z = self.in_proj(x).chunk(2, -1)
        u = F.silu(self.conv1d(u.mT)[..., : x.shape[1]].mT)
        dt, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], -1)
        dt = F.softplus(self.dt_proj(dt))
        A = -self.A_log.exp()
        h = torch.zeros_like(A)
        ys = []
        for t in range(x.shape[1]):
            h = torch.exp(dt[:, t, :, None] * A) * h + (dt * u)[:, t, :, None] * B[:, t, None]
            ys.append((h * C[:, t, None]).sum(-1))
        return self.out_proj((torch.stack(ys, 1) + self.D * u) * F.silu(z))


class MambaBlock(nn.Module):
    """x + mixer(norm(x))."""

    def __init__(self, d_model: int, kind: type[nn.Module] = MambaMixer, **mixer: Any) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(d_model, eps=1e-5)
        self.mixer = kind(d_model, **mixer)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixer(self.norm(x))


class MambaBackbone(nn.Module):
    """An embedding, blocks and a norm."""

    def __init__(self, vocab_size: int, d_model: int, n_layer: int, **mixer: Any) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(vocab_size, d_model)
        self.layers = nn.Sequential(*[MambaBlock(d_model, **mixer) for _ in range(n_layer)])
        self.norm_f = nn.RMSNorm(d_model, eps=1e-5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.norm_f(self.layers(self.embeddings(tokens)))


class Mamba(nn.Module):
    """A backbone, and a head on it."""

    kind: type[nn.Module] = MambaMixer

    def __init__(self, vocab_size: int, d_model: int, n_layer: int, tied: bool = True, **mixer: Any) -> None:
        super().__init__()
        self.backbone = MambaBackbone(vocab_size, d_model, n_layer, kind=self.kind, **mixer)
        self.lm_head = nn.Linear(d_model, vocab_size, bias=False)
        if tied:
            self.lm_head.weight = self.backbone.embeddings.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.backbone(tokens))
