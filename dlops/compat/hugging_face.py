"""Mamba mixers of Hugging Face's models on :mod:`dlops.functional`: the classes that :func:`dlops.patch` swaps in.

Each inherits what its original has, and takes the same arguments and the same cache. Where steps follow others in a
cache, the scan goes on from the state that is kept there, however many they are; the originals do so for single steps.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Conv1d, Linear, Module, Parameter
from transformers.models.falcon_mamba import modeling_falcon_mamba
from transformers.models.jamba import modeling_jamba
from transformers.models.mamba import modeling_mamba

from dlops import functional as F


class _Mixer(Module):
    """The forward that the mixers share."""

    in_proj: Linear
    conv1d: Conv1d
    x_proj: Linear
    dt_proj: Linear
    out_proj: Linear
    A_log: Parameter
    D: Parameter
    activation: str
    layer_idx: int

    def forward(
        self, hidden_states: Tensor, cache_params: Any = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """hidden_states: (batch, seqlen, hidden_size); attention_mask: (batch, seqlen), 0 where there is padding."""
        if any(value is not None for value in kwargs.values()):  # packed sequences: the original says what they need
            return super().forward(hidden_states, cache_params, attention_mask, **kwargs)
        seqlen, layer = hidden_states.shape[1], self.layer_idx
        conv_state = ssm_state = None
        if cache_params is not None:
            conv_state = cache_params.get_conv_state(layer, state_idx=0)
            ssm_state = cache_params.get_recurrent_state(layer, state_idx=0)
        step = seqlen == 1 and not torch.is_grad_enabled()  # what advances in place has no gradient
        recording = cache_params is not None and cache_params.is_recording_past(layer)

        x, z = self.in_proj(_masked(hidden_states, attention_mask)).mT.chunk(2, 1)
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        if step and conv_state is not None and not recording:
            u = F.causal_conv1d_update(x, conv_state, weight, bias, self.activation)
        else:
            if cache_params is not None:  # x with what is kept of the steps before it
                x = cache_params.update_conv_state(x, layer, conv_kernel_size=self.conv_kernel_size)
            u = F.causal_conv1d(x, weight, bias, self.activation)
            u = u[..., -seqlen:]  # type: ignore[index]

        u = _masked(u.mT, attention_mask)
        dt, B, C = self._normed(*self.x_proj(u).split([self.time_step_rank, *[self.ssm_state_size] * 2], -1))
        dt = F.linear(dt, self.dt_proj.weight)
        A = -torch.exp(self.A_log.to(torch.promote_types(u.dtype, torch.float32)))
        if step and ssm_state is not None:
            inputs = u[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], self.D, z[..., 0]
            y = F.selective_state_update(ssm_state, *inputs, self.dt_proj.bias, True)[:, None]
        else:
            initial_state = None if ssm_state is None else ssm_state.to(A.dtype)
            inputs = u.mT, dt.mT, A, B.mT, C.mT, self.D, z
            y, last_state = F.selective_scan(*inputs, self.dt_proj.bias, True, initial_state, return_last_state=True)
            y = y.mT
            if cache_params is not None:
                cache_params.update_recurrent_state(last_state, layer)
        return self.out_proj(y.to(hidden_states.dtype))

    def _normed(self, dt: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return dt, B, C

    @staticmethod
    def obstacle(mixer: Any) -> str | None:
        """Why a mixer that is the original cannot run this forward."""
        if mixer.activation not in ("silu", "swish"):
            return f"its activation is {mixer.activation!r}, the kernels have silu"
        for name in ("conv1d", "dt_proj"):  # whose weights are read, not called
            child = getattr(mixer, name)
            if type(child.weight) is not Parameter:
                return f"its {name}.weight is a {type(child.weight).__name__}"
            if hasattr(child, "_hf_hook"):
                return f"its {name} has a hook of accelerate, which a call would have to trigger"
        return None


class _NormedMixer(_Mixer):
    dt_layernorm: Callable[[Tensor], Tensor]
    b_layernorm: Callable[[Tensor], Tensor]
    c_layernorm: Callable[[Tensor], Tensor]

    def _normed(self, dt: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.dt_layernorm(dt), self.b_layernorm(B), self.c_layernorm(C)


class MambaMixer(_Mixer, modeling_mamba.MambaMixer):
    """MambaForCausalLM's mixer."""


class FalconMambaMixer(_NormedMixer, modeling_falcon_mamba.FalconMambaMixer):
    """FalconMambaForCausalLM's mixer."""


class JambaMambaMixer(_NormedMixer, modeling_jamba.JambaMambaMixer):
    """JambaForCausalLM's mixer of state spaces."""


REPLACEMENTS: dict[type[Module], type[Module]] = {
    modeling_mamba.MambaMixer: MambaMixer,
    modeling_falcon_mamba.FalconMambaMixer: FalconMambaMixer,
    modeling_jamba.JambaMambaMixer: JambaMambaMixer,
}


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else (x * mask[..., None]).to(x.dtype)
