"""Mamba-2: a language model of state spaces whose heads of channels share a step size and a decay.

Dao and Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality",
2024. The parameters have the names of Hugging Face's Mamba2ForCausalLM, whose state dicts load.
"""

import math

import torch
from torch import Tensor, nn

from dlops import functional as F
from dlops.models.mamba import Mamba, MambaState, advance_conv, entered
from dlops.nn import Linear, RMSNorm


class Mamba2Mixer(nn.Module):
    """Projection, causal convolution, scan, gate, norm and projection.

    Args:
        d_model: the width of what goes in and comes out.
        d_state, d_conv: the states per channel; the width of the convolution.
        expand: d_inner, the number of channels, over d_model.
        headdim: channels per head; divides d_inner.
        ngroups: groups of heads that share B and C; divides the number of heads.
    """

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
        self.d_inner, self.d_state, self.headdim, self.ngroups = expand * d_model, d_state, headdim, ngroups
        self.nheads = self.d_inner // headdim
        if self.nheads * headdim != self.d_inner or self.nheads % ngroups:
            raise ValueError(
                f"Mamba2Mixer: headdim is {headdim} and ngroups {ngroups}, accepted are a divisor of d_inner = "
                f"{self.d_inner} and one of the number of heads"
            )
        channels = self.d_inner + 2 * ngroups * d_state
        self.in_proj = Linear(d_model, self.d_inner + channels + self.nheads, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, d_conv, groups=channels, padding=d_conv - 1)
        self.dt_bias = nn.Parameter(torch.empty(self.nheads))
        self.A_log = nn.Parameter(torch.empty(self.nheads))
        self.D = nn.Parameter(torch.empty(self.nheads))
        self.norm = RMSNorm(self.d_inner, eps=1e-5)
        self.out_proj = Linear(self.d_inner, d_model, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The paper's initialisation: -A uniform between 1 and 16, step sizes log-uniform between 1e-3 and 1e-1."""
        self.A_log.uniform_(1, 16).log_()
        nn.init.ones_(self.D)
        dt = torch.empty_like(self.dt_bias).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus of it is dt

    def initial_state(self, batch: int) -> MambaState:
        """The state before the first step: the convolution's (batch, channels, d_conv - 1), and the scan's (batch,
        nheads, headdim, d_state)."""
        weight = self.conv1d.weight
        return MambaState(
            weight.new_zeros(batch, weight.shape[0], weight.shape[2] - 1),
            self._A().new_zeros(batch, self.nheads, self.headdim, self.d_state),
        )

    def forward(self, x: Tensor, state: MambaState | None = None) -> Tensor:
        """x: (batch, seqlen, d_model), all steps at once; returns the same shape. With a state the sequence goes on
        from it, and it becomes the last one: no gradient flows into it."""
        z, u, dt = self._projected(x)
        conv, ssm = (None, None) if state is None else entered(state, u.dtype)
        u, last_conv = F.causal_conv1d(
            u.mT, self.conv1d.weight.squeeze(1), self.conv1d.bias, "silu", conv, return_final_states=True
        )
        u, B, C = self._split(u.mT)
        y, last_ssm = F.ssd_scan(
            u,
            dt,
            self._A(),
            B,
            C,
            self.D,
            z.unflatten(-1, u.shape[-2:]),
            self.dt_bias,
            True,
            initial_states=ssm,
            return_final_states=True,
        )
        if state is not None:
            state.conv.copy_(last_conv.detach())
            state.ssm.copy_(last_ssm.detach())
        return self.out_proj(self._normed(y.flatten(-2)))

    @torch.no_grad()
    def step(self, x: Tensor, state: MambaState) -> Tensor:
        """One step: x (batch, d_model), after the steps that ``state`` has seen; returns the same shape."""
        z, u, dt = self._projected(x)
        u = advance_conv(self.conv1d, u, state.conv)
        u, B, C = self._split(u)
        heads = self.nheads, self.headdim
        y = F.selective_state_update(
            state.ssm,
            u,
            dt[..., None].expand(u.shape),
            self._A()[:, None, None].expand(*heads, self.d_state),
            B,
            C,
            self.D[:, None].expand(heads),
            z.unflatten(-1, heads),
            self.dt_bias[:, None].expand(heads),
            True,
        )
        return self.out_proj(self._normed(y.flatten(-2)))

    def _A(self) -> Tensor:
        return -self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)).exp()

    def _normed(self, y: Tensor) -> Tensor:
        """The RMS norm of each group of heads by itself."""
        if self.ngroups == 1:
            return self.norm(y)
        size = self.d_inner // self.ngroups
        groups = F.rms_norm(y.unflatten(-1, (self.ngroups, size)), [size], eps=self.norm.eps)
        return groups.flatten(-2) * self.norm.weight

    def _projected(self, x: Tensor) -> list[Tensor]:
        """The gate, what the convolution takes, and the step sizes without their bias."""
        return self.in_proj(x).split([self.d_inner, self.conv1d.weight.shape[0], self.nheads], -1)

    def _split(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the convolution returns as the scan's x (..., nheads, headdim), B and C (..., ngroups, d_state)."""
        x, B, C = u.split([self.d_inner, *[self.ngroups * self.d_state] * 2], -1)
        groups = self.ngroups, self.d_state
        return x.unflatten(-1, (self.nheads, self.headdim)), B.unflatten(-1, groups), C.unflatten(-1, groups)


class Mamba2(Mamba):
    """:class:`~dlops.models.Mamba` with Mamba-2's mixers."""

    kind = Mamba2Mixer


def mamba2_130m() -> Mamba2:
    """The smallest model of the paper, untrained: 24 blocks of width 768, GPT-NeoX's tokens."""
    return Mamba2(vocab_size=50288, d_model=768, n_layer=24)
