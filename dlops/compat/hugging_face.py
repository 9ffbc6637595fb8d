"""Mamba mixers of Hugging Face's models on :mod:`dlops.functional`: the classes that :func:`dlops.patch` swaps in.

Each inherits what its original has, and takes the same arguments and the same cache. Where steps follow others in a
cache, the scan goes on from the state that is kept there, however many they are; the originals do so for single steps.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import Conv1d, Linear, Module, Parameter
from transformers.cache_utils import Cache
from transformers.models.falcon_mamba import modeling_falcon_mamba
from transformers.models.jamba import modeling_jamba
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2

from dlops import functional as F


class _Mixer(Module):
    """The forward that all mixers share: projection, convolution, what a kind of mixer does, projection."""

    in_proj: Linear
    conv1d: Conv1d
    out_proj: Linear
    A_log: Parameter
    D: Parameter
    activation: str
    layer_idx: int

    def forward(
        self,
        hidden_states: Tensor,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        *,
        cache_params: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """hidden_states: (batch, seqlen, hidden_size); attention_mask: (batch, seqlen), 0 where there is padding;
        cache_params: what transformers before 5.24 calls the cache."""
        cache = cache_params if cache is None else cache
        if any(value is not None for value in kwargs.values()):  # packed sequences: the original says what they need
            return super().forward(hidden_states, cache, attention_mask, **kwargs)
        seqlen, layer = hidden_states.shape[1], self.layer_idx
        conv_state = ssm_state = None
        if cache is not None:
            conv_state = cache.get_conv_state(layer, state_idx=0)
            ssm_state = cache.get_recurrent_state(layer, state_idx=0)
        step = seqlen == 1 and not torch.is_grad_enabled()  # what advances in place has no gradient
        recording = cache is not None and cache.is_recording_past(layer)

        x, *rest = self._projected(_masked(hidden_states, attention_mask))
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        if step and conv_state is not None and not recording:
            u = F.causal_conv1d_update(x.mT, conv_state, weight, bias, self.activation)
        else:
            x = x.mT
            if cache is not None:  # x with what is kept of the steps before it
                x = cache.update_conv_state(x, layer, conv_kernel_size=self.conv_kernel_size)
            u = F.causal_conv1d(x, weight, bias, self.activation)
            u = u[..., -seqlen:]  # type: ignore[index]

        u = _masked(u.mT, attention_mask)
        A = -torch.exp(self.A_log.to(torch.promote_types(u.dtype, torch.float32)))
        if step and ssm_state is not None:
            y = self._update(ssm_state, u[:, 0], A, *(t[:, 0] for t in rest))[:, None]
        else:
            y, last_state = self._scan(None if ssm_state is None else ssm_state.to(A.dtype), u, A, *rest)
            if cache is not None:
                cache.update_recurrent_state(last_state, layer)
        return self.out_proj(y.to(hidden_states.dtype))

    def _projected(self, x: Tensor) -> Sequence[Tensor]:
        """What the convolution takes, and what the scan does besides; all (batch, seqlen, ...)."""
        raise NotImplementedError

    def _scan(self, initial_state: Tensor | None, u: Tensor, A: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        """What the last projection takes, and the state after the last step; u is what the convolution returns."""
        raise NotImplementedError

    def _update(self, state: Tensor, u: Tensor, A: Tensor, *rest: Tensor) -> Tensor:
        """The same of one step, of which u and the rest are (batch, ...); ``state`` advances in place."""
        raise NotImplementedError

    @staticmethod
    def obstacle(mixer: Any) -> str | None:
        """Why a mixer that is the original cannot run this forward."""
        if not hasattr(Cache, "get_recurrent_state"):
            return f"transformers {transformers.__version__} is here, whose caches are others; it takes 5.21 or newer"
        if mixer.activation not in ("silu", "swish"):
            return f"its activation is {mixer.activation!r}, the kernels have silu"
        for name, child in mixer.named_children():
            if name not in ("conv1d", "dt_proj"):  # whose weights are read, not called
                continue
            if type(child.weight) is not Parameter:
                return f"its {name}.weight is a {type(child.weight).__name__}"
            if hasattr(child, "_hf_hook"):
                return f"its {name} has a hook of accelerate, which a call would have to trigger"
        return None


class _MambaMixer(_Mixer):
    """The selective scan."""

    x_proj: Linear
    dt_proj: Linear
    time_step_rank: int
    ssm_state_size: int

    def _projected(self, x: Tensor) -> Sequence[Tensor]:
        return self.in_proj(x).chunk(2, -1)

    def _scan(self, initial_state: Tensor | None, u: Tensor, A: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        dt, B, C = (t.mT for t in self._coefficients(u))
        bias, (z,) = self.dt_proj.bias, rest
        y, last = F.selective_scan(u.mT, dt, A, B, C, self.D, z.mT, bias, True, initial_state, return_last_state=True)
        return y.mT, last

    def _update(self, state: Tensor, u: Tensor, A: Tensor, *rest: Tensor) -> Tensor:
        (dt, B, C), (z,) = self._coefficients(u), rest
        return F.selective_state_update(state, u, dt, A, B, C, self.D, z, self.dt_proj.bias, True)

    def _coefficients(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The step sizes without their bias, B and C."""
        parts = self._normed(*self.x_proj(u).split([self.time_step_rank, *[self.ssm_state_size] * 2], -1))
        dt, B, C = (part.to(u.dtype) for part in parts)  # a norm's weights may be wider
        return F.linear(dt, self.dt_proj.weight), B, C

    def _normed(self, dt: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return dt, B, C


class _NormedMixer(_MambaMixer):
    dt_layernorm: Callable[[Tensor], Tensor]
    b_layernorm: Callable[[Tensor], Tensor]
    c_layernorm: Callable[[Tensor], Tensor]

    def _normed(self, dt: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.dt_layernorm(dt), self.b_layernorm(B), self.c_layernorm(C)


class MambaMixer(_MambaMixer, modeling_mamba.MambaMixer):
    """MambaForCausalLM's mixer."""


class FalconMambaMixer(_NormedMixer, modeling_falcon_mamba.FalconMambaMixer):
    """FalconMambaForCausalLM's mixer."""


class JambaMambaMixer(_NormedMixer, modeling_jamba.JambaMambaMixer):
    """JambaForCausalLM's mixer of state spaces."""


class Mamba2Mixer(_Mixer, modeling_mamba2.Mamba2Mixer):
    """Mamba2ForCausalLM's mixer. As in the original, a step by itself has no limit on its size."""

    norm: Callable[[Tensor, Tensor], Tensor]
    dt_bias: Parameter
    time_step_limit: tuple[float, float]

    def _projected(self, x: Tensor) -> Sequence[Tensor]:
        z, u, dt = self.in_proj(x).split([self.intermediate_size, self.conv_dim, self.num_heads], -1)
        return u, z, dt

    def _scan(self, initial_state: Tensor | None, u: Tensor, A: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        (x, B, C), (z, dt) = self._split(u), rest
        y, last = F.ssd_scan(
            x,
            dt,
            A,
            B,
            C,
            self.D,
            None,
            self.dt_bias,
            True,
            self.time_step_limit,
            initial_state,
            return_final_states=True,
        )
        return self.norm(y.flatten(-2), z), last

    def _update(self, state: Tensor, u: Tensor, A: Tensor, *rest: Tensor) -> Tensor:
        (x, B, C), (z, dt) = self._split(u), rest
        A, D, dt_bias = (t[:, None].expand(x.shape[1:]) for t in (A, self.D, self.dt_bias))
        A, dt = A[..., None].expand(state.shape[1:]), dt[..., None].expand(x.shape)
        y = F.selective_state_update(state, x, dt, A, B, C, D, None, dt_bias, True)
        return self.norm(y.flatten(-2), z)

    def _split(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (..., nheads, headdim), B and C (..., ngroups, dstate)."""
        x, B, C = u.split([self.intermediate_size, *[self.n_groups * self.ssm_state_size] * 2], -1)
        groups = self.n_groups, self.ssm_state_size
        return x.unflatten(-1, (self.num_heads, self.head_dim)), B.unflatten(-1, groups), C.unflatten(-1, groups)


REPLACEMENTS: dict[type[Module], type[Module]] = {
    modeling_mamba.MambaMixer: MambaMixer,
    modeling_mamba2.Mamba2Mixer: Mamba2Mixer,
    modeling_falcon_mamba.FalconMambaMixer: FalconMambaMixer,
    modeling_jamba.JambaMambaMixer: JambaMambaMixer,
}


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else (x * mask[..., None]).to(x.dtype)
