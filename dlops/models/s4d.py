"""S4D: a state space layer with a diagonal transition, run as a long convolution or step by step.

Gu, Gupta, Goel and Ré, "On the Parameterization and Initialization of Diagonal State Space Models", 2022.
"""

import math

import torch
from torch import Tensor, nn

from dlops import functional as F
from dlops.nn import GatedLinear


class S4D(nn.Module):
    """A diagonal state space model per channel, GELU and a gated linear unit across channels.

    Args:
        d_model: the number of channels.
        d_state: the states per channel, conjugates counted: even.

    x: (batch, seqlen, d_model); returns the same shape.
    """

    def __init__(self, d_model: int, d_state: int = 64) -> None:
        super().__init__()
        half = d_state // 2
        self.log_dt = nn.Parameter(torch.empty(d_model))
        self.log_A_real = nn.Parameter(torch.empty(d_model, half))
        self.A_imag = nn.Parameter(torch.empty(d_model, half))
        self.C = nn.Parameter(torch.empty(d_model, half, 2))  # real and imaginary part
        self.D = nn.Parameter(torch.empty(d_model))
        self.out = GatedLinear(d_model, d_model, bias=True, activation="sigmoid")
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """S4D-Lin: A[n] = -1/2 + i pi n; step sizes log-uniform between 1e-3 and 1e-1."""
        self.log_dt.uniform_(math.log(1e-3), math.log(1e-1))
        nn.init.constant_(self.log_A_real, math.log(0.5))
        self.A_imag.copy_(math.pi * torch.arange(self.A_imag.shape[1]))
        nn.init.normal_(self.C, std=math.sqrt(0.5))
        nn.init.normal_(self.D)

    def forward(self, x: Tensor) -> Tensor:
        A, C, dt = self._system()
        kernel = F.s4d_kernel(A, C, dt, x.shape[1])
        return self.out(F.gelu(F.fft_conv1d(x.mT, kernel, self.D)).mT)

    def initial_state(self, batch: int) -> Tensor:
        """The state before the first step: (batch, d_model, d_state / 2), complex."""
        A = self._system()[0]
        return A.new_zeros(batch, *A.shape)

    @torch.no_grad()
    def step(self, x: Tensor, state: Tensor) -> Tensor:
        """One step: x (batch, d_model), after the steps that ``state`` has seen; it is advanced in place."""
        A, C, dt = self._system()
        transition = torch.exp(dt[:, None] * A)
        state.mul_(transition).add_((transition - 1) / A * x[..., None])
        y = 2 * (C * state).sum(-1).real + self.D * x
        return self.out(F.gelu(y.to(x.dtype)))

    def _system(self) -> tuple[Tensor, Tensor, Tensor]:
        """A, C and dt, in float32 or more."""
        dtype = torch.promote_types(self.D.dtype, torch.float32)
        A = torch.complex(-self.log_A_real.to(dtype).exp(), self.A_imag.to(dtype))
        return A, torch.view_as_complex(self.C.to(dtype)), self.log_dt.to(dtype).exp()
