"""Decoding steps: samples for the contract, the parallel forms as another formula, what is written, bad input."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import dlops
import dlops.functional as F
from dlops import _op, backend
from dlops._op import Op
from dlops.ops import state_update
from dlops.testing import Make, samples

SCAN_FLAGS = ("D", "z", "dt_bias", "dt_softplus", "indices", "rounded_state", "shared")
CONV_FLAGS = ("bias", "silu", "circular", "indices", "float_weight", "channels_last")


def entries_of(batch: int, make: Make) -> Tensor:
    """Every other entry of twice as many, backwards; of three or more batch elements the second has none."""
    entries = torch.arange(2 * batch - 1, -1, -2, dtype=torch.int32, device=make.device)
    return torch.where(torch.arange(batch, device=make.device) == (1 if batch > 2 else -1), -1, entries)


def scan_arguments(
    make: Make,
    nheads: int,
    head_dim: int,
    dstate: int,
    flags: Sequence[str] = (),
    batch: int = 2,
    groups: int = 1,
) -> tuple[Any, ...]:
    """Arguments of the op, with the optional ones that ``flags`` name; A negative, so that the state decays by e on
    average, whatever dt's magnitude. ``shared``: one dt, A, D and dt_bias per head, as in Mamba-2."""
    real = torch.promote_types(make.dtype, torch.float32)
    shared = "shared" in flags
    per_head = 1 if shared else head_dim

    def per_channel() -> Tensor:
        return make(nheads, per_head).to(real).expand(nheads, head_dim)

    softplus = "dt_softplus" in flags
    dt = make(batch, nheads, per_head).expand(batch, nheads, head_dim)
    dt = dt if softplus else dt.abs()
    dt_bias = per_channel() if "dt_bias" in flags else None
    dt_bias = dt_bias.abs() if dt_bias is not None and not softplus else dt_bias
    A = -make(nheads, per_head, 1 if shared else dstate).to(real).abs()
    step = dt.to(real) if dt_bias is None else dt + dt_bias
    step = torch.nn.functional.softplus(step) if softplus else step
    if A.numel() and step.numel():
        A = A / (step.double().mean() * A.double().abs().mean()).to(real)
    indices = entries_of(batch, make) if "indices" in flags else None
    state = make(batch if indices is None else 2 * batch, nheads, head_dim, dstate)
    return (
        make(batch, nheads, head_dim),
        dt,
        A.expand(nheads, head_dim, dstate),
        make(batch, groups, dstate),
        make(batch, groups, dstate),
        per_channel() if "D" in flags else None,
        make(batch, nheads, head_dim) if "z" in flags else None,
        dt_bias,
        state if "rounded_state" in flags else state.to(real),
        indices,
        softplus,
    )


# Plackett and Burman's design of 8 runs: every two of seven flags in all four combinations.
PAIRWISE = [*("1110100"[i:] + "1110100"[:i] for i in range(7)), "0000000"]


def chosen(flags: Sequence[str], run: str) -> list[str]:
    return [flag for flag, on in zip(flags, run, strict=False) if on == "1"]


@samples(state_update.selective_state_update, degree=5)
def selective_state_update_samples(make: Make) -> Iterator[tuple[Any, ...]]:
    yield scan_arguments(make, 1, 24, 4, ("D", "z", "dt_bias", "dt_softplus"))
    for i, run in enumerate(PAIRWISE):
        flags = chosen(SCAN_FLAGS, run)
        yield scan_arguments(make, 4, 5 + i, 3 + i, flags, batch=3, groups=(1, 2, 4)[i % 3])
    every = ("D", "z", "dt_bias", "dt_softplus", "indices")
    for nheads, head_dim, dstate in [
        (1, 1, 1),
        (2, 3, 0),
        (1, 7, 1),
        (1, 16, 16),
        (1, 33, 17),
        (3, 8, 15),
        (1, 9, 256),
    ]:
        yield scan_arguments(make, nheads, head_dim, dstate, every)
        yield scan_arguments(make, nheads, head_dim, dstate, ("rounded_state",))
    yield scan_arguments(make, 2, 64, 128, ("D", "dt_bias", "dt_softplus", "shared"), groups=2)
    yield scan_arguments(make, 2, 5, 3, every, batch=0)


def conv_arguments(
    make: Make,
    dim: int,
    width: int,
    seqlen: int,
    state_len: int,
    flags: Sequence[str] = (),
    batch: int = 2,
    dilation: int = 1,
) -> tuple[Any, ...]:
    """Arguments of the op, with the optional ones that ``flags`` name."""
    parameter = torch.promote_types(make.dtype, torch.float32 if "float_weight" in flags else make.dtype)
    x = make(batch, seqlen, dim).mT
    indices = entries_of(batch, make) if "indices" in flags else None
    steps = torch.tensor([3, 0, 11], dtype=torch.int32, device=make.device)
    return (
        x if "channels_last" in flags else x.contiguous(),
        make(dim, width).to(parameter),
        make(dim).to(parameter) if "bias" in flags else None,
        make(batch if indices is None else 2 * batch, dim, state_len),
        steps[:batch] if "circular" in flags else None,
        indices,
        "silu" if "silu" in flags else "none",
        dilation,
    )


@samples(state_update.causal_conv1d_update, degree=4)
def causal_conv1d_update_samples(make: Make) -> Iterator[tuple[Any, ...]]:
    yield conv_arguments(make, 9, 4, 3, 5, ("bias", "silu"))
    for i, run in enumerate(PAIRWISE):
        dilation = 1 + i % 2
        reach = (1 + i % 4) * dilation
        flags = chosen(CONV_FLAGS, run)
        yield conv_arguments(make, 3 + i, 2 + i % 4, 1 + i % 3, reach + i % 3, flags, batch=3, dilation=dilation)
    every = ("bias", "silu", "indices")
    for dim, width, seqlen, state_len in [(1, 1, 1, 0), (2, 3, 0, 2), (7, 4, 1, 4), (33, 4, 9, 5), (70, 2, 1, 1)]:
        yield conv_arguments(make, dim, width, seqlen, state_len, every)
        yield conv_arguments(make, dim, width, seqlen, state_len, (*every, "circular"))
    yield conv_arguments(make, 5, 4, 1, 3, every, batch=0)


def scan_step(args: Sequence[Any], seqlen: int) -> tuple[Tensor, Tensor]:
    """The outputs of ``seqlen`` steps with the same arguments, and the state after them."""
    state = args[8].clone()
    call = (*args[:8], state, *args[9:])
    return torch.stack([state_update.selective_state_update(*call) for _ in range(seqlen)], -1), state


@pytest.mark.parametrize("run", PAIRWISE)
def test_steps_are_a_selective_scan(run: str) -> None:
    """Heads and groups flattened into channels, L equal steps."""
    flags = [flag for flag in chosen(SCAN_FLAGS, run) if flag != "indices"]
    args = scan_arguments(Make(torch.float64), 4, 5, 3, flags, groups=2)
    x, dt, A, B, C, D, z, dt_bias, state, _, softplus = args
    ys, last = scan_step(args, 6)

    def steps(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.flatten(1)[..., None].expand(-1, -1, 6)

    y, final = F.selective_scan(
        steps(x),
        steps(dt),
        A.flatten(0, 1),
        *(t[..., None].expand(-1, -1, -1, 6) for t in (B, C)),
        *(None if p is None else p.flatten() for p in (D,)),
        steps(z),
        None if dt_bias is None else dt_bias.flatten(),
        softplus,
        state.flatten(1, 2),
        return_last_state=True,
    )
    torch.testing.assert_close((ys.flatten(1, 2), last.flatten(1, 2)), (y, final))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [False, True])
def test_functional_updates_the_state_it_was_given(heads: bool, dtype: torch.dtype) -> None:
    make = Make(dtype)
    shape = (3, 4) if heads else (12,)
    x, dt, z = make(2, *shape), make(2, *shape), make(2, *shape)
    A, D, dt_bias = -make(*shape, 5).float().abs(), make(*shape), make(*shape)
    B, C, state = make(2, 5), make(2, 5), make(4, *shape, 5).float()
    before = state.clone()
    y = F.selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, True, torch.tensor([2, 0]))
    step = torch.nn.functional.softplus(dt.float() + dt_bias.float())
    lead = (slice(None), None, None) if heads else (slice(None), None)
    h = torch.exp(step[..., None] * A) * before[[2, 0]] + (step * x.float())[..., None] * B.float()[lead]
    out = (h * C.float()[lead]).sum(-1) + D.float() * x.float()
    torch.testing.assert_close(state[[2, 0]], h)
    assert torch.equal(state[[1, 3]], before[[1, 3]])
    torch.testing.assert_close(y, (out * torch.nn.functional.silu(z.float())).to(dtype))


@pytest.mark.parametrize("state_len", [3, 4, 7])
@pytest.mark.parametrize("pieces", [[1] * 9, [2, 3, 4], [9], [0, 5, 0, 4]])
def test_pieces_are_a_causal_conv1d(pieces: list[int], state_len: int) -> None:
    make = Make(torch.float64)
    x, weight, bias = make(2, 5, 9), make(5, 4), make(5)
    expected = F.causal_conv1d(x, weight, bias, "silu")
    shifted, circular = torch.zeros(2, 5, state_len).double(), torch.zeros(2, 5, state_len).double()
    steps = torch.zeros(2, dtype=torch.int32)
    ys: list[list[Tensor]] = [[], []]
    for piece in x.split(pieces, 2):
        one_step = piece.shape[2] == 1
        given = piece[..., 0] if one_step else piece
        ys[0].append(F.causal_conv1d_update(given, shifted, weight, bias, "silu").view_as(piece))
        ys[1].append(F.causal_conv1d_update(given, circular, weight, bias, "silu", steps).view_as(piece))
        steps = steps + piece.shape[2]
    for y in ys:
        torch.testing.assert_close(torch.cat(y, 2), expected)
    assert torch.equal(shifted, x[..., -state_len:])
    places = torch.arange(9 - state_len, 9) % state_len
    assert torch.equal(circular[..., places], x[..., -state_len:])


def test_batch_elements_go_on_from_their_own_entries() -> None:
    make = Make(torch.float32)
    x, weight, state = make(2, 6), make(6, 3), make(5, 6, 4)
    before = state.clone()
    y = F.causal_conv1d_update(x, state, weight, conv_state_indices=torch.tensor([4, 1]))
    alone = before[[4, 1]]
    torch.testing.assert_close(y, F.causal_conv1d_update(x, alone, weight))
    assert torch.equal(state[[4, 1]], alone) and torch.equal(state[[0, 2, 3]], before[[0, 2, 3]])


OPS = state_update.selective_state_update, state_update.causal_conv1d_update


def serving(op: Op, name: str, args: Sequence[Any]) -> Any:
    """In it ``name`` runs the op; skips the test where it cannot."""
    if reason := backend.refusal(op, name, args):
        pytest.skip(reason)
    return dlops.use_backend(name)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@pytest.mark.parametrize("name", ["torch", "cpu", "cuda", "triton"])
def test_nothing_beside_a_view_is_written(name: str, op: Op) -> None:
    """The state may be every other element of a larger tensor; the negative of another is refused."""
    args = Make(torch.float32).samples(op)[0]
    at = op.argument_names.index(op.mutates[0])
    big = torch.full([2 * size for size in args[at].shape], 7.0)
    part = big[tuple(slice(1, None, 2) for _ in args[at].shape)].copy_(args[at])
    state = args[at].clone()
    with serving(op, name, args):
        for view in (state, part):
            op(*args[:at], view, *args[at + 1 :])
        with pytest.raises(RuntimeError, match="which is a negated view"):
            op(*args[:at], torch.complex(state, state).conj().imag, *args[at + 1 :])
    assert (big == 7).sum() == big.numel() - state.numel()
    assert not torch.equal(state, args[at])
    torch.testing.assert_close(part, state)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@pytest.mark.parametrize("name", ["torch", "cpu", "cuda", "triton"])
def test_a_batch_element_without_an_entry(name: str, op: Op) -> None:
    """Its result is zero, whatever its numbers, and nothing is kept. The host reads no indices on a GPU: there one that
    is too large names no entry either."""
    at = op.argument_names.index(op.mutates[0])
    which = next(i for i, argument in enumerate(op.argument_names) if argument.endswith("_indices"))
    args = next(args for args in Make(torch.float32).samples(op) if args[which] is not None and args[0].shape[0] == 3)

    with serving(op, name, args):
        for missing in (-1, -7) if name == "cpu" else (-1, args[at].shape[0]):
            state, indices, x = args[at].clone(), args[which].clone(), args[0].clone()
            indices[0], x[0] = missing, math.nan
            y = op(x, *(state if i == at else indices if i == which else a for i, a in enumerate(args) if i))
            assert not y[0].any()
            written = (state != args[at]).flatten(1).any(1).nonzero().flatten()
            assert written.tolist() == sorted(entry for entry in indices[1:].tolist() if entry >= 0)


def test_autograd_sees_what_is_written() -> None:
    """A gradient is refused, and a tensor that a backward needs is not changed under it, however the op is called."""
    args = list(scan_arguments(Make(torch.float32), 1, 6, 4))
    for call in (state_update.selective_state_update, torch.ops.dlops.selective_state_update):
        for i in (0, 8):
            given = [a.clone().requires_grad_() if i == j else a for j, a in enumerate(args)]
            with pytest.raises(RuntimeError, match="writes state in place and has no gradient"):
                call(*given)
            with torch.no_grad():
                assert not call(*given).requires_grad
        weight = torch.ones_like(args[8], requires_grad=True)
        product = (weight * args[8]).sum()
        call(*args)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()
        with torch.inference_mode():
            call(*[a.clone() if isinstance(a, Tensor) else a for a in args])


def test_one_graph_of_a_model_that_decodes() -> None:
    """In a compiled function the state advances in place, step after step."""
    args = list(scan_arguments(Make(torch.float32), 1, 6, 4, ("D", "z")))
    alone = [a.clone() if isinstance(a, Tensor) else a for a in args]

    def decode(*args: Any) -> Tensor:
        return state_update.selective_state_update(*args) + state_update.selective_state_update(*args)

    compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), decode(*alone))
    torch.testing.assert_close(args[8], alone[8])


def test_an_op_that_writes_has_no_formula() -> None:
    with pytest.raises(AssertionError, match="written in place has no gradient"):
        state_update.selective_state_update.register_autograd(lambda *_: [])
    assert not _op.registry["causal_conv1d_update"].differentiable


def call_scan(**changes: Any) -> Tensor:
    good = {
        "state": torch.zeros(2, 6, 4),
        "x": torch.zeros(2, 6),
        "dt": torch.zeros(2, 6),
        "A": torch.zeros(6, 4),
        "B": torch.zeros(2, 4),
        "C": torch.zeros(2, 4),
    }
    return F.selective_state_update(**(good | changes))


def call_conv(**changes: Any) -> Tensor:
    good = {"x": torch.zeros(2, 6), "conv_state": torch.zeros(2, 6, 3), "weight": torch.zeros(6, 4)}
    return F.causal_conv1d_update(**(good | changes))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(6)}, RuntimeError, r"x has shape \(6,\), accepted is \(batch, nheads, head_dim\)"),
        ({"x": torch.zeros(2, 6, dtype=torch.int32)}, RuntimeError, "x has dtype torch.int32"),
        ({"dt": torch.zeros(2, 5)}, RuntimeError, r"dt has shape \(2, 1, 5\), .* = \(2, 1, 6\)"),
        ({"dt": torch.zeros(2, 6).half()}, RuntimeError, "dt has dtype torch.float16, accepted is torch.float32"),
        ({"A": torch.zeros(5, 4)}, RuntimeError, r"A has shape \(1, 5, 4\), .* = \(1, 6, at most 256\)"),
        ({"A": torch.zeros(6, 257)}, RuntimeError, "at most 256"),
        ({"A": torch.zeros(6, 4) + 0j}, RuntimeError, "A has dtype torch.complex64, accepted is torch.float32"),
        ({"B": torch.zeros(2, 3)}, RuntimeError, r"B has shape \(2, 1, 3\), .* = \(2, 1, 4\)"),
        ({"B": torch.zeros(2, 2, 4)}, RuntimeError, "B has 2 groups, accepted are divisors of nheads = 1"),
        ({"C": torch.zeros(1, 4)}, RuntimeError, r"C has shape \(1, 1, 4\)"),
        ({"D": torch.zeros(5)}, RuntimeError, r"D has shape \(1, 5\)"),
        ({"z": torch.zeros(2, 6).double()}, RuntimeError, "z has dtype torch.float64"),
        ({"dt_bias": torch.zeros(6, device="meta")}, RuntimeError, "dt_bias is on meta"),
        ({"state": torch.zeros(3, 6, 4)}, RuntimeError, r"state has shape \(3, 1, 6, 4\), .*\(2, 1, 6, 4\)"),
        ({"state": torch.zeros(2, 6, 4).half()}, RuntimeError, "state has dtype torch.float16"),
        ({"state": torch.zeros(6, 4).expand(2, 6, 4)}, RuntimeError, "several elements of state"),
        ({"state_batch_indices": torch.tensor([0, 2])}, ValueError, r"is \[0, 2\], accepted are distinct numbers"),
        ({"state_batch_indices": torch.tensor([1, 1])}, ValueError, "distinct numbers from 0 to 1"),
        ({"state_batch_indices": torch.tensor([-1, 2])}, ValueError, r"is \[-1, 2\]"),
        ({"state_batch_indices": torch.tensor([1])}, RuntimeError, r"state_batch_indices has shape \(1,\)"),
        ({"state_batch_indices": torch.tensor([0.0, 1.0])}, RuntimeError, "has dtype torch.float32"),
    ],
)
def test_bad_state_update(change: dict[str, Any], error: type[Exception], message: str) -> None:
    assert not call_scan().any()
    state = change.get("state", torch.ones(2, 6, 4))
    before = state.clone()
    with pytest.raises(error, match=message):
        call_scan(**{"state": state, **change})
    assert torch.equal(state, before)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(6)}, RuntimeError, r"x has shape \(6,\), accepted is \(batch, dim, seqlen\)"),
        ({"x": torch.zeros(2, 6).int()}, RuntimeError, "x has dtype torch.int32"),
        ({"weight": torch.zeros(5, 4)}, RuntimeError, r"weight has shape \(5, 4\), accepted is \(dim, width\)"),
        ({"weight": torch.zeros(6, 4).half()}, RuntimeError, "weight has dtype torch.float16"),
        ({"weight": torch.zeros(6, 5)}, RuntimeError, r"\(2, 6, at least 4\)"),
        ({"bias": torch.zeros(5)}, RuntimeError, r"bias has shape \(5,\)"),
        ({"conv_state": torch.zeros(2, 6, 2)}, RuntimeError, r"conv_state has shape \(2, 6, 2\), .*at least 3\)"),
        ({"conv_state": torch.zeros(3, 6, 3)}, RuntimeError, r"conv_state has shape \(3, 6, 3\)"),
        ({"conv_state": torch.zeros(2, 6, 3).double()}, RuntimeError, "conv_state has dtype torch.float64"),
        ({"conv_state": torch.zeros(2, 6, 1).expand(2, 6, 3)}, RuntimeError, "several elements of conv_state"),
        ({"dilation": 2}, RuntimeError, "at least 6"),
        ({"dilation": 0}, ValueError, "dilation is 0"),
        ({"activation": "gelu"}, ValueError, "activation is 'gelu'"),
        ({"cache_seqlens": torch.zeros(2)}, RuntimeError, "cache_seqlens has dtype torch.float32"),
        ({"cache_seqlens": torch.zeros(3).int()}, RuntimeError, r"cache_seqlens has shape \(3,\)"),
        ({"conv_state_indices": torch.tensor([0, 2])}, ValueError, "distinct numbers from 0 to 1"),
    ],
)
def test_bad_conv1d_update(change: dict[str, Any], error: type[Exception], message: str) -> None:
    assert not call_conv().any()
    with pytest.raises(error, match=message):
        call_conv(**change)
