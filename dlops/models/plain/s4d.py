"""S4D in plain torch.nn: every power of every transition is formed."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GatedLinear(nn.Module):
    """sigmoid(x weight_gate^T + bias_gate) * (x weight_up^T + bias_up)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        gate, up = nn.Linear(in_features, out_features), nn.Linear(in_features, out_features)
        self.weight_gate, self.bias_gate = gate.weight, gate.bias
        self.weight_up, self.bias_up = up.weight, up.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(F.linear(x, self.weight_gate, self.bias_gate)) * F.linear(x, self.weight_up, self.bias_up)


class S4D(nn.Module):
    """A diagonal state space model per channel, GELU and a gated linear unit across channels."""

    def __init__(self, d_model: int, d_state: int = 64) -> None:
        super().__init__()
        half = d_state // 2
        self.log_dt = nn.Parameter(torch.empty(d_model).uniform_(math.log(1e-3), math.log(1e-1)))
        self.log_A_real = nn.Parameter(torch.full((d_model, half), math.log(0.5)))
        self.A_imag = nn.Parameter(math.pi * torch.arange(half).repeat(d_model, 1))
        self.C = nn.Parameter(torch.randn(d_model, half, 2) * math.sqrt(0.5))
        self.D = nn.Parameter(torch.randn(d_model))
        self.out = GatedLinear(d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        seqlen = x.shape[1]
        A = torch.complex(-self.log_A_real.to(dtype).exp(), self.A_imag.to(dtype))
        exponent = self.log_dt.to(dtype).exp()[:, None] * A
        C = torch.view_as_complex(self.C.to(dtype)) * (torch.exp(exponent) - 1) / A
        powers = torch.exp(exponent[..., None] * torch.arange(seqlen, device=x.device))
        kernel = 2 * (C[..., None] * powers).sum(1).real
        u = x.mT.to(dtype)
        y = torch.fft.irfft(torch.fft.rfft(u, 2 * seqlen) * torch.fft.rfft(kernel, 2 * seqlen), 2 * seqlen)
        y = y[..., :seqlen] + self.D.to(dtype)[:, None] * u
        return self.out(F.gelu(y.to(x.dtype)).mT)
