"""Mamba-2 in plain torch.nn: the scan is a loop over steps."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlops.models.plain.mamba import Mamba


class Mamba2Mixer(nn.Module):
    """Projection, causal convolution, scan, gate, norm and projection."""

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        expand: int = 2,
        headdim: int = 64,
        ngroups: int = 1,
    ) -> None:
        super().__init__()
        self.d_inner, self.d_state, self.ngroups = expand * d_model, d_state, ngroups
        self.nheads = self.d_inner // headdim
        channels = self.d_inner + 2 * ngroups * d_state
        self.in_proj = nn.Linear(d_model, self.d_inner + channels + self.nheads, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, d_conv, groups=channels, padding=d_conv - 1)
        self.dt_bias = nn.Parameter(torch.zeros(self.nheads))
        self.A_log = nn.Parameter(torch.arange(1, self.nheads + 1).log())
        self.D = nn.Parameter(torch.ones(self.nheads))
        self.norm = nn.RMSNorm(self.d_inner, eps=1e-5)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        groups = self.ngroups * self.d_state
        z, u, dt = self.in_proj(x).split([self.d_inner, self.d_inner + 2 * groups, self.nheads], -1)
        u = F.silu(self.conv1d(u.mT)[..., : x.shape[1]].mT)
        u, B, C = u.split([self.d_inner, groups, groups], -1)
        u = u.unflatten(-1, (self.nheads, -1))
        B, C = (t.unflatten(-1, (self.ngroups, -1)).repeat_interleave(self.nheads // self.ngroups, 2) for t in (B, C))
        dt = F.softplus(dt + self.dt_bias)
        decay = torch.exp(dt * -self.A_log.exp())
        h, ys = u.new_zeros(()), []
        for t in range(x.shape[1]):
            h = decay[:, t, :, None, None] * h + (dt[:, t, :, None] * u[:, t])[..., None] * B[:, t, :, None]
            ys.append((h * C[:, t, :, None]).sum(-1))
        y = torch.stack(ys, 1) + self.D[:, None] * u
        y = (y.flatten(2) * F.silu(z)).unflatten(2, (self.ngroups, -1))
        y = F.rms_norm(y, y.shape[3:], eps=self.norm.eps).flatten(2) * self.norm.weight
        return self.out_proj(y)


class Mamba2(Mamba):
    """Mamba with Mamba-2's mixers."""

    kind = Mamba2Mixer
