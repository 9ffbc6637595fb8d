"""The linear recurrence h[t] = a[t] h[t-1] + b[t] per channel: RG-LRU, HGRN, minGRU, S5.

De et al., "Griffin", 2024; Qin et al., "Hierarchically Gated Recurrent Neural Network", 2023; Feng et al., "Were RNNs
All We Needed?", 2024; Martin and Cundy, "Parallelizing Linear Recurrent Neural Nets Over Sequence Length", 2018, for
the gradient.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dlops import backend
from dlops._op import acc, op
from dlops.ops._check import FLOATING, Arguments
from dlops.ops._layout import asked_for, empty_in_layout_of, in_layout_of

COMPLEX = frozenset({torch.complex64, torch.complex128})


def _check(a: Tensor, b: Tensor, initial_state: Tensor | None, reverse: bool) -> None:
    name = "linear_scan"
    if a.dtype not in FLOATING | COMPLEX:
        raise RuntimeError(
            f"{name}: a has dtype {a.dtype}, accepted are float32, bfloat16, float16, float64, complex64 and complex128"
        )
    if a.dim() != 3:
        raise RuntimeError(f"{name}: a has shape {tuple(a.shape)}, accepted is (batch, dim, seqlen)")
    arguments = Arguments(name, "a", a)
    arguments.check("b", b, a.dtype, ("(batch, dim, seqlen)", a.shape))
    arguments.check("initial_state", initial_state, acc(a.new_empty(0)).dtype, ("(batch, dim)", a.shape[:2]))


# ---- definitions ---------------------------------------------------------------------------------------------------


def _states(a: Tensor, b: Tensor, initial: Tensor) -> Tensor:
    """h in the dtype of the states."""
    h, states = initial, []
    for a_t, b_t in zip(a.unbind(2), b.unbind(2), strict=True):
        h = acc(a_t) * h + acc(b_t)
        states.append(h)
    return torch.stack(states, 2) if states else acc(a)


def _in_order(reverse: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The steps in the order in which the recurrence takes them."""
    return tuple(x.flip(2) for x in tensors) if reverse else tensors


def _zeros(a: Tensor) -> Tensor:
    return acc(a.new_zeros(a.shape[:2]))


def _fake(a: Tensor, b: Tensor, initial_state: Tensor | None, reverse: bool) -> Tensor:
    return empty_in_layout_of(b)


@op(returns=("h",), check=_check, fake=_fake)
def linear_scan(a: Tensor, b: Tensor, initial_state: Tensor | None, reverse: bool) -> Tensor:
    """h[t] = a[t] h[t-1] + b[t], with ``reverse`` h[t] = a[t] h[t+1] + b[t], from the initial state (batch, dim).

    a, b and h are (batch, dim, seqlen), h channels-last in memory if b is; the state is float32 where they are less.
    """
    initial = _zeros(a) if initial_state is None else initial_state
    factors, inputs = _in_order(reverse, a, b)
    (h,) = _in_order(reverse, _states(factors, inputs, initial))
    return in_layout_of(h.to(b.dtype), b)


def _fake_backward(
    dh: Tensor, a: Tensor, h: Tensor, initial_state: Tensor | None, reverse: bool, output_mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    found = empty_in_layout_of(a), empty_in_layout_of(h), torch.empty_like(_zeros(a))
    return asked_for(found, a, output_mask)


@op(returns=("da", "db", "dinitial_state"), fake=_fake_backward)
def linear_scan_backward(
    dh: Tensor, a: Tensor, h: Tensor, initial_state: Tensor | None, reverse: bool, output_mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`linear_scan`: db[t] = dh[t] + conj(a[t+1]) db[t+1], the recurrence in the other direction."""
    initial = _zeros(a) if initial_state is None else initial_state
    dh, a_t, before = _in_order(reverse, dh, acc(a), acc(h))
    before = torch.cat([initial[..., None], before], 2)[..., :-1]
    following = torch.cat([a_t, torch.zeros_like(a_t[..., :1])], 2)[..., 1:]
    db = _states(following.conj().flip(2), dh.flip(2), _zeros(a)).flip(2)
    dinitial = (a_t.conj() * db)[..., :1].sum(2)
    da, db = _in_order(reverse, db * before.conj(), db)
    found = (
        in_layout_of(da.to(a.dtype), a),
        in_layout_of(db.to(h.dtype), h),
        dinitial.clone(memory_format=torch.contiguous_format),
    )
    return asked_for(found, a, output_mask)


# ---- gradients -----------------------------------------------------------------------------------------------------


def _formula(
    grads: Sequence[Any], args: Sequence[Any], extras: Sequence[Tensor], mask: list[bool]
) -> Sequence[Tensor | None]:
    a, _, initial_state, reverse = args
    return *linear_scan_backward(grads[0], a, extras[0], initial_state, reverse, mask[:3]), None


linear_scan.register_autograd(_formula, saves=lambda args, outputs: (args, outputs))


# ---- backends ------------------------------------------------------------------------------------------------------


def _rule(*args: Any) -> Sequence[str]:
    return ("cpu", "torch") if args[0].is_cpu else ("triton", "torch")


for _op in (linear_scan, linear_scan_backward):
    _op.rule = _rule
    for _name in ("cpu", "triton"):
        _op.implement(_name, dtypes=(*backend.KERNEL_DTYPES, torch.complex64))
