"""S5: one state space model of many inputs and outputs, run as a scan.

Smith, Warrington and Linderman, "Simplified State Space Layers for Sequence Modeling", 2023.
"""

import math

import torch
from torch import Tensor, nn

from dlops import functional as F
from dlops.nn import Linear


class S5(nn.Module):
    """A diagonal state space model across channels, GELU and a gate.

    Args:
        d_model: the number of channels.
        d_state: the states, conjugates counted: even.
        bidirectional: scan from the last step to the first, too.

    x: (batch, seqlen, d_model); returns the same shape.
    """

    def __init__(self, d_model: int, d_state: int = 64, bidirectional: bool = False) -> None:
        super().__init__()
        half = d_state // 2
        self.bidirectional = bidirectional
        self.log_dt = nn.Parameter(torch.empty(half))
        self.log_A_real = nn.Parameter(torch.empty(half))
        self.A_imag = nn.Parameter(torch.empty(half))
        self.B = nn.Parameter(torch.empty(half, d_model, 2))  # real and imaginary part
        self.C = nn.Parameter(torch.empty(d_model, 2 * half if bidirectional else half, 2))
        self.D = nn.Parameter(torch.empty(d_model))
        self.gate = Linear(d_model, d_model)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """S4D-Lin's A[n] = -1/2 + i pi n; step sizes log-uniform between 1e-3 and 1e-1."""
        self.log_dt.uniform_(math.log(1e-3), math.log(1e-1))
        nn.init.constant_(self.log_A_real, math.log(0.5))
        self.A_imag.copy_(math.pi * torch.arange(len(self.A_imag)))
        nn.init.normal_(self.B, std=(2 * self.B.shape[1]) ** -0.5)
        nn.init.normal_(self.C, std=(2 * self.C.shape[1]) ** -0.5)
        nn.init.normal_(self.D)

    def forward(self, x: Tensor) -> Tensor:
        transition, B, C = self._system()
        inputs = self._inputs(x, B).mT
        return self._outputs(F.diagonal_scan(transition, inputs, bidirectional=self.bidirectional).mT, x, C)

    def initial_state(self, batch: int) -> Tensor:
        """The state before the first step: (batch, d_state / 2), complex."""
        transition = self._system()[0]
        return transition.new_zeros(batch, *transition.shape)

    @torch.no_grad()
    def step(self, x: Tensor, state: Tensor) -> Tensor:
        """One step: x (batch, d_model), after the steps that ``state`` has seen; it is advanced in place.

        Raises:
            RuntimeError: the layer is bidirectional: its output depends on later steps.
        """
        if self.bidirectional:
            raise RuntimeError("S5.step: the layer is bidirectional, so a step depends on later ones; call the layer")
        transition, B, C = self._system()
        state.mul_(transition).add_(self._inputs(x, B))
        return self._outputs(state, x, C)

    def _system(self) -> tuple[Tensor, Tensor, Tensor]:
        """The transition, B and C of the discrete system, in float32 or more."""
        dtype = torch.promote_types(self.D.dtype, torch.float32)
        A = torch.complex(-self.log_A_real.to(dtype).exp(), self.A_imag.to(dtype))
        B, C = (torch.view_as_complex(t.to(dtype)) for t in (self.B, self.C))
        transition = torch.exp(self.log_dt.to(dtype).exp() * A)
        return transition, ((transition - 1) / A)[:, None] * B, C

    @staticmethod
    def _inputs(x: Tensor, B: Tensor) -> Tensor:
        """B x for each step; x is real, so two real products serve."""
        with torch.autocast(x.device.type, enabled=False):
            parts = x.to(B.real.dtype) @ torch.cat([B.real, B.imag]).mT
        return torch.complex(*parts.chunk(2, -1))

    def _outputs(self, states: Tensor, x: Tensor, C: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            y = 2 * torch.cat([states.real, states.imag], -1) @ torch.cat([C.real, -C.imag], 1).mT
        y = F.gelu((y + self.D.to(y.dtype) * x.to(y.dtype)).to(x.dtype))
        return y * torch.sigmoid(self.gate(y))
