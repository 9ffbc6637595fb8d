"""Mamba: a language model of selective state spaces.

Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023. The parameters have the names of
Hugging Face's MambaForCausalLM, whose state dicts load.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dlops import functional as F
from dlops.nn import Linear, RMSNorm


class MambaState(NamedTuple):
    """What a mixer keeps between the steps of a sequence; advances in place.

    Args:
        conv: (batch, d_inner, d_conv - 1), the last inputs of the convolution.
        ssm: (batch, d_inner, d_state), the state of the scan, in float32 (float64 in a float64 model).
    """

    conv: Tensor
    ssm: Tensor


def advance_conv(conv1d: nn.Conv1d, u: Tensor, state: Tensor) -> Tensor:
    """A step of a mixer's convolution: u (batch, dim), perhaps narrowed by autocast; ``state`` advances in place."""
    return F.causal_conv1d_update(u.to(state.dtype), state, conv1d.weight.squeeze(1), conv1d.bias, "silu").to(u.dtype)


def entered(state: MambaState, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The state that a sequence in ``dtype`` (autocast narrows it) goes on from. Copies where a backward may need
    them: the state is written to."""
    copy = torch.is_grad_enabled()
    return state.conv.to(dtype, copy=copy), state.ssm.clone() if copy else state.ssm


class MambaMixer(nn.Module):
    """Projection, causal convolution, selective scan, gate and projection.

    Args:
        d_model: the width of what goes in and comes out.
        d_state, d_conv: the states per channel; the width of the convolution.
        expand: d_inner, the number of channels, over d_model.
        dt_rank: rank of the projection to the step sizes; None: d_model / 16, rounded up.
    """

    def __init__(
        self, d_model: int, d_state: int = 16, d_conv: int = 4, expand: int = 2, dt_rank: int | None = None
    ) -> None:
        super().__init__()
        self.d_inner, self.d_state = expand * d_model, d_state
        self.dt_rank = math.ceil(d_model / 16) if dt_rank is None else dt_rank
        self.in_proj = Linear(d_model, 2 * self.d_inner, bias=False)
        self.conv1d = nn.Conv1d(self.d_inner, self.d_inner, d_conv, groups=self.d_inner, padding=d_conv - 1)
        self.x_proj = Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = Linear(self.dt_rank, self.d_inner)
        self.A_log = nn.Parameter(torch.empty(self.d_inner, d_state))
        self.D = nn.Parameter(torch.empty(self.d_inner))
        self.out_proj = Linear(self.d_inner, d_model, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The paper's initialisation: A = -(1, 2, ..., d_state), step sizes log-uniform between 1e-3 and 1e-1."""
        self.A_log.copy_(torch.arange(1, self.d_state + 1).log().expand_as(self.A_log))
        nn.init.ones_(self.D)
        bound = self.dt_rank**-0.5
        nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        dt = torch.empty_like(self.dt_proj.bias).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus of it is dt

    def initial_state(self, batch: int) -> MambaState:
        """The state before the first step."""
        weight, A = self.conv1d.weight, self._A()
        return MambaState(
            weight.new_zeros(batch, self.d_inner, weight.shape[2] - 1),
            A.new_zeros(batch, self.d_inner, self.d_state),
        )

    def forward(self, x: Tensor, state: MambaState | None = None) -> Tensor:
        """x: (batch, seqlen, d_model), all steps at once; returns the same shape. With a state the sequence goes on
        from it, and it becomes the last one: no gradient flows into it."""
        u, z = self.in_proj(x).mT.chunk(2, 1)
        conv, ssm = (None, None) if state is None else entered(state, u.dtype)
        u, last_conv = F.causal_conv1d(
            u, self.conv1d.weight.squeeze(1), self.conv1d.bias, "silu", conv, return_final_states=True
        )
        dt, B, C = self._coefficients(u.mT)
        y, last_ssm = F.selective_scan(
            u, dt.mT, self._A(), B.mT, C.mT, self.D, z, self.dt_proj.bias, True, ssm, return_last_state=True
        )
        if state is not None:
            state.conv.copy_(last_conv.detach())
            state.ssm.copy_(last_ssm.detach())
        return self.out_proj(y.mT)

    @torch.no_grad()
    def step(self, x: Tensor, state: MambaState) -> Tensor:
        """One step: x (batch, d_model), after the steps that ``state`` has seen; returns the same shape."""
        u, z = self.in_proj(x).chunk(2, 1)
        u = advance_conv(self.conv1d, u, state.conv)
        dt, B, C = self._coefficients(u)
        y = F.selective_state_update(state.ssm, u, dt, self._A(), B, C, self.D, z, self.dt_proj.bias, True)
        return self.out_proj(y)

    def _A(self) -> Tensor:
        return -self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)).exp()

    def _coefficients(self, u: Tensor) -> list[Tensor]:
        """The step sizes without their bias (..., d_inner), B and C (..., d_state) of u (..., d_inner)."""
        dt, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], -1)
        return [F.linear(dt, self.dt_proj.weight), B, C]


class MambaBlock(nn.Module):
    """x + mixer(norm(x)); the arguments are those of the mixer, a ``kind``."""

    def __init__(self, d_model: int, kind: type[Any] = MambaMixer, **mixer: Any) -> None:
        super().__init__()
        self.norm = RMSNorm(d_model, eps=1e-5)
        self.mixer = kind(d_model, **mixer)

    def forward(self, x: Tensor, state: MambaState | None = None) -> Tensor:
        return x + self.mixer(self.norm(x), state)

    @torch.no_grad()
    def step(self, x: Tensor, state: MambaState) -> Tensor:
        return x + self.mixer.step(self.norm(x), state)


class MambaBackbone(nn.Module):
    """An embedding, blocks and a norm; the arguments are :class:`Mamba`'s and :class:`MambaBlock`'s."""

    def __init__(self, vocab_size: int, d_model: int, n_layer: int, **mixer: Any) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(vocab_size, d_model)
        self.layers = nn.ModuleList([MambaBlock(d_model, **mixer) for _ in range(n_layer)])
        self.norm_f = RMSNorm(d_model, eps=1e-5)

    def forward(self, tokens: Tensor, states: Sequence[MambaState | None]) -> Tensor:
        x = self.embeddings(tokens)
        for layer, state in zip(self.layers, states, strict=True):
            x = layer(x, state)
        return self.norm_f(x)

    def step(self, tokens: Tensor, states: Sequence[MambaState]) -> Tensor:
        x = self.embeddings(tokens)
        for layer, state in zip(self.layers, states, strict=True):
            x = layer.step(x, state)  # type: ignore[operator]
        return self.norm_f(x)


class Mamba(nn.Module):
    """A backbone, and a head on it.

    Args:
        vocab_size: number of tokens.
        d_model, n_layer: the width, and how many blocks.
        tied: the head's weight is the embedding's.
        mixer: further arguments of :attr:`kind`.
    """

    kind: type[Any] = MambaMixer

    def __init__(self, vocab_size: int, d_model: int, n_layer: int, tied: bool = True, **mixer: Any) -> None:
        super().__init__()
        self.backbone = MambaBackbone(vocab_size, d_model, n_layer, kind=self.kind, **mixer)
        self.lm_head = Linear(d_model, vocab_size, bias=False)
        nn.init.normal_(self.backbone.embeddings.weight, std=0.02)
        nn.init.normal_(self.lm_head.weight, std=0.02)
        if tied:
            self.lm_head.weight = self.backbone.embeddings.weight
        for module in self._mixers():  # n_layer branches add up on the residual stream
            module.out_proj.weight.data /= math.sqrt(n_layer)

    def _mixers(self) -> Iterator[Any]:
        return (module for module in self.modules() if isinstance(module, self.kind))

    def initial_states(self, batch: int) -> list[MambaState]:
        """The states of all layers before the first token."""
        return [mixer.initial_state(batch) for mixer in self._mixers()]

    def forward(self, tokens: Tensor, states: Sequence[MambaState] | None = None) -> Tensor:
        """tokens: (batch, seqlen) integers; returns the logits of what follows each, (batch, seqlen, vocab_size). With
        states the sequence goes on from them, and they advance in place."""
        return self.lm_head(self.backbone(tokens, states or [None] * len(self.backbone.layers)))

    @torch.no_grad()
    def step(self, tokens: Tensor, states: Sequence[MambaState]) -> Tensor:
        """tokens: (batch,), one more of each sequence; returns the logits of the next, (batch, vocab_size), and
        advances the states in place."""
        return self.lm_head(self.backbone.step(tokens, states))

    @torch.no_grad()
    def generate(self, tokens: Tensor, max_new_tokens: int) -> Tensor:
        """tokens (batch, seqlen >= 1), and the most likely one after another: (batch, seqlen + max_new_tokens)."""
        states = self.initial_states(tokens.shape[0])
        logits, found = self(tokens, states)[:, -1], [tokens]
        for _ in range(max_new_tokens):
            found.append(logits.argmax(-1, keepdim=True))
            logits = self.step(found[-1][:, 0], states)
        return torch.cat(found, 1)


def mamba_130m() -> Mamba:
    """The smallest model of the paper, untrained: 24 blocks of width 768, GPT-NeoX's tokens."""
    return Mamba(vocab_size=50280, d_model=768, n_layer=24)
