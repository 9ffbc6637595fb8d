"""S5 in plain torch.nn: the scan is a loop over steps."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class S5(nn.Module):
    """A diagonal state space model across channels, GELU and a gate."""

    def __init__(self, d_model: int, d_state: int = 64, bidirectional: bool = False) -> None:
        super().__init__()
        half = d_state // 2
        columns = 2 * half if bidirectional else half
        self.bidirectional = bidirectional
        self.log_dt = nn.Parameter(torch.empty(half).uniform_(math.log(1e-3), math.log(1e-1)))
        self.log_A_real = nn.Parameter(torch.full((half,), math.log(0.5)))
        self.A_imag = nn.Parameter(math.pi * torch.arange(half))
        self.B = nn.Parameter(torch.randn(half, d_model, 2) * (2 * d_model) ** -0.5)
        self.C = nn.Parameter(torch.randn(d_model, columns, 2) * (2 * columns) ** -0.5)
        self.D = nn.Parameter(torch.randn(d_model))
        self.gate = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        A = torch.complex(-self.log_A_real.to(dtype).exp(), self.A_imag.to(dtype))
        B, C = (torch.view_as_complex(t.to(dtype)) for t in (self.B, self.C))
        transition = torch.exp(self.log_dt.to(dtype).exp() * A)
        u = x.to(dtype)
        inputs = (u.to(A.dtype) @ (((transition - 1) / A)[:, None] * B).mT).unbind(1)
        states = torch.stack(self._scan(transition, inputs), 1)
        if self.bidirectional:
            backward = self._scan(transition, inputs[::-1])[::-1]
            states = torch.cat([states, torch.stack(backward, 1)], 2)
        y = 2 * (states @ C.mT).real + self.D.to(dtype) * u
        y = F.gelu(y.to(x.dtype))
        return y * torch.sigmoid(self.gate(y))

    @staticmethod
    def _scan(transition: Tensor, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        h, states = torch.zeros_like(inputs[0]), []
        for b in inputs:
            h = transition * h + b
            states.append(h)
        return states
