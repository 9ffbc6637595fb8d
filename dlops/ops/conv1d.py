"""The causal depthwise convolution over time that precedes the scan in state space models, with its activation.

Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, section 3.4; van den Oord et al.,
"WaveNet", 2016, for the dilation.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dlops._op import acc, op
from dlops.ops._check import FLOATING, Arguments
from dlops.ops._layout import asked_for, empty_in_layout_of, in_layout_of

ACTIVATIONS = ("none", "silu")


def check_convolution(
    name: str, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, dilation: int
) -> Arguments:
    """Checks what a convolution and its step share; the result checks their other arguments."""
    if x.dtype not in FLOATING:
        raise RuntimeError(f"{name}: x has dtype {x.dtype}, accepted are float32, bfloat16, float16 and float64")
    if x.dim() != 3:
        raise RuntimeError(f"{name}: x has shape {tuple(x.shape)}, accepted is (batch, dim, seqlen)")
    dim = x.shape[1]
    if weight.dim() != 2 or weight.shape[0] != dim or weight.shape[1] < 1:
        raise RuntimeError(f"{name}: weight has shape {tuple(weight.shape)}, accepted is (dim, width) = ({dim}, >= 1)")
    if dilation < 1:
        raise ValueError(f"{name}: dilation is {dilation}, accepted are integers >= 1")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{name}: activation is {activation!r}, accepted are {', '.join(ACTIVATIONS)}")
    arguments = Arguments(name, "x", x)
    parameter = x.dtype, torch.promote_types(x.dtype, torch.float32)
    arguments.check("weight", weight, parameter, ("(dim, width)", weight.shape))
    arguments.check("bias", bias, parameter, ("(dim,)", (dim,)))
    return arguments


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str,
    dilation: int,
    return_final_states: bool,
) -> None:
    arguments = check_convolution("causal_conv1d", x, weight, bias, activation, dilation)
    if seq_idx is not None and cu_seqlens is not None:
        raise ValueError("causal_conv1d: got seq_idx and cu_seqlens, accepted is one of them")
    batch, dim, seqlen = x.shape
    kind, sequences = arguments.sequences(batch, cu_seqlens)
    states = sequences, dim, reach(weight, dilation)
    arguments.check("bias", bias, weight.dtype, ("(dim,)", (dim,)))
    arguments.check("seq_idx", seq_idx, torch.int32, ("(batch, seqlen)", (batch, seqlen)))
    arguments.check("initial_states", initial_states, x.dtype, (f"({kind}, dim, (width - 1) * dilation)", states))


def reach(weight: Tensor, dilation: int) -> int:
    """How many steps before its own an output depends on: the length of the states."""
    return (weight.shape[1] - 1) * dilation


# ---- which steps a step sees ---------------------------------------------------------------------------------------


class _Window:
    """The steps that every step sees, as positions in the states joined with x: (batch, dim, states + seqlen)."""

    def __init__(
        self, x: Tensor, weight: Tensor, dilation: int, seq_idx: Tensor | None, cu_seqlens: Tensor | None
    ) -> None:
        self.x, self.width, self.dilation, self.reach = x, weight.shape[1], dilation, reach(weight, dilation)
        self.step = torch.arange(x.shape[2], device=x.device)
        self.seq_idx = seq_idx if x.shape[2] else None
        self.bounds: tuple[Tensor, Tensor] | None = None
        self.states = self.reach  # in the joined tensor, before x
        if cu_seqlens is not None:
            self.bounds = cu_seqlens[:-1], cu_seqlens[1:]
            self.sequence = torch.searchsorted(self.bounds[1].contiguous(), self.step, right=True)
            self.states = self.reach * (cu_seqlens.shape[0] - 1)
        if self.seq_idx is not None:  # the initial state belongs to the first step's sequence
            self.owner = torch.cat([self.seq_idx[:, :1].expand(-1, self.reach), self.seq_idx], 1)

    def join(self, x: Tensor, states: Tensor | None) -> Tensor:
        """The states, zero if None, before x."""
        if states is None:
            return F.pad(x, (self.states, 0))
        return torch.cat([states if self.bounds is None else states.transpose(0, 1).flatten(1)[None], x], 2)

    def split(self, joined: Tensor) -> tuple[Tensor, Tensor]:
        """Undoes :meth:`join`: x and the states."""
        states, x = joined.split([self.states, self.x.shape[2]], 2)
        if self.bounds is not None:
            states = states[0].reshape(states.shape[1], self.bounds[0].shape[0], self.reach)
            states = states.transpose(0, 1)
        return x, states

    def seen(self, tap: int) -> Tensor:
        """(seqlen,): where each step finds the step that ``weight[:, tap]`` multiplies."""
        back = (self.width - 1 - tap) * self.dilation
        if self.bounds is None:
            return self.states + self.step - back
        inside = self.step - self.bounds[0][self.sequence] - back
        return torch.where(inside >= 0, self.states + self.step - back, (self.sequence + 1) * self.reach + inside)

    def last(self) -> Tensor:
        """(reach,) or (num_sequences, reach): where the final states are."""
        offset = torch.arange(-self.reach, 0, device=self.x.device)
        if self.bounds is None:
            return self.states + self.x.shape[2] + offset
        begin, end = (bound[:, None] for bound in self.bounds)
        following = torch.arange(1, begin.shape[0] + 1, device=begin.device)[:, None]
        inside = end - begin + offset
        return torch.where(inside >= 0, self.states + end + offset, following * self.reach + inside)

    def same(self, position: Tensor) -> Tensor | None:
        """(batch, 1, seqlen): whether what each step finds there belongs to its own sequence, which is not padding."""
        if self.seq_idx is None:
            return None
        return ((self.owner[:, position] == self.seq_idx) & (self.seq_idx >= 0))[:, None]

    def same_last(self) -> Tensor | None:
        """(batch, 1, reach): whether the steps of the final states belong to the last step's sequence."""
        if self.seq_idx is None:
            return None
        end = self.seq_idx[:, -1:]
        return ((self.owner[:, self.last()] == end) & (end >= 0))[:, None]


def _keep(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else torch.where(mask, x, 0)


def _pre_activation(window: _Window, joined: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = torch.zeros_like(acc(window.x)) if bias is None else acc(bias)[:, None].expand(window.x.shape)
    for tap in range(window.width):
        seen = window.seen(tap)
        y = y + _keep(acc(joined.index_select(2, seen)), window.same(seen)) * acc(weight)[:, tap, None]
    return y


# ---- definitions ---------------------------------------------------------------------------------------------------


def _fake_causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str,
    dilation: int,
    return_final_states: bool,
) -> tuple[Tensor, Tensor]:
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (sequences, x.shape[1], reach(weight, dilation)) if return_final_states else (0,)
    return empty_in_layout_of(x), x.new_empty(shape)


@op(returns=("y", "final_states"), check=_check, fake=_fake_causal_conv1d)
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str,
    dilation: int,
    return_final_states: bool,
) -> tuple[Tensor, Tensor]:
    """y[t] = activation(sum of weight[:, k] x[t - (width - 1 - k) dilation] over k, plus bias) per channel of x (batch,
    dim, seqlen); before a sequence's first step come its initial states, or zeros. y is channels-last in memory if x
    is. final_states are the last (width - 1) dilation steps of every sequence, initial states included.

    With seq_idx (batch, seqlen) a step sees those of equal index only, and y is zero where its own is negative; the
    initial states belong to the first step's sequence, the final ones to the last step's.
    """
    window = _Window(x, weight, dilation, seq_idx, cu_seqlens)
    joined = window.join(x, initial_states)
    y = _pre_activation(window, joined, weight, bias)
    y = F.silu(y) if activation == "silu" else y
    y = _keep(y, None if window.seq_idx is None else (window.seq_idx >= 0)[:, None])
    final = x.new_empty(0)
    if return_final_states:
        last = window.last()
        final = joined.index_select(2, last.flatten()).unflatten(2, last.shape)
        final = _keep(final, window.same_last()) if cu_seqlens is None else final[0].transpose(0, 1)
    return in_layout_of(y.to(x.dtype), x), final.clone(memory_format=torch.contiguous_format)


@op(returns=("dx", "dweight", "dbias", "dinitial_states"))
def causal_conv1d_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    dfinal_states: Tensor | None,
    activation: str,
    dilation: int,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`causal_conv1d`."""
    window = _Window(x, weight, dilation, seq_idx, cu_seqlens)
    joined = window.join(x, initial_states)
    dpre = acc(dy)
    if activation == "silu":
        pre = _pre_activation(window, joined, weight, bias)
        sigmoid = torch.sigmoid(pre)
        dpre = dpre * (sigmoid * (1 + pre * (1 - sigmoid)))
    dpre = _keep(dpre, None if window.seq_idx is None else (window.seq_idx >= 0)[:, None])
    djoined, dweight = acc(torch.zeros_like(joined)), []
    for tap in range(window.width):
        seen = window.seen(tap)
        same = window.same(seen)
        dweight.append((_keep(acc(joined.index_select(2, seen)), same) * dpre).sum((0, 2)))
        djoined = djoined.index_add(2, seen, _keep(dpre * acc(weight)[:, tap, None], same))
    if dfinal_states is not None:
        dfinal = acc(dfinal_states)
        dfinal = _keep(dfinal, window.same_last()) if cu_seqlens is None else dfinal.transpose(0, 1).flatten(1)[None]
        djoined = djoined.index_add(2, window.last().flatten(), dfinal)
    dx, dinitial = window.split(djoined.to(x.dtype))
    gradients = (
        in_layout_of(dx, x),
        torch.stack(dweight, 1).to(weight.dtype),
        dpre.sum((0, 2)).to(weight.dtype if bias is None else bias.dtype),
        dinitial.clone(memory_format=torch.contiguous_format),
    )
    return asked_for(gradients, x, output_mask)


# ---- gradients -----------------------------------------------------------------------------------------------------


def _formula(
    grads: Sequence[Any], args: Sequence[Any], extras: Sequence[Tensor], mask: list[bool]
) -> Sequence[Tensor | None]:
    dy, dfinal_states = grads
    *tensors, activation, dilation, return_final_states = args
    dfinal_states = dfinal_states if return_final_states else None
    dy = torch.zeros_like(args[0]) if dy is None else dy
    dx, dweight, dbias, dinitial = causal_conv1d_backward(
        dy, *tensors, dfinal_states, activation, dilation, [*mask[:4]]
    )
    return dx, dweight, dbias, dinitial, None, None, None, None, None


causal_conv1d.register_autograd(_formula)


# ---- backends ------------------------------------------------------------------------------------------------------


def _rule(*args: Any) -> Sequence[str]:
    # On a GPU: unmeasured.
    return ("cpu", "torch") if args[0].is_cpu else ("cuda", "triton", "torch")


for _op in (causal_conv1d, causal_conv1d_backward):
    _op.rule = _rule
    _op.implement("cpu")
    _op.implement("cuda")
    _op.implement("triton")
