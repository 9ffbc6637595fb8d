"""causal_conv1d: samples for the contract, torch's conv1d as another formula, states, boundaries, bad input."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import dlops.functional as F
from dlops.ops import conv1d
from dlops.testing import Make, samples

FLAGS = ("bias", "silu", "initial_states", "final_states", "seq_idx", "packed", "channels_last", "float_weight")


def arguments(
    make: Make, dim: int, width: int, seqlen: int, flags: Sequence[str] = (), batch: int = 2, dilation: int = 1
) -> tuple[Any, ...]:
    """Arguments of the op, with the optional ones that ``flags`` name."""
    batch = 1 if "packed" in flags else batch
    x = make(batch, seqlen, dim).mT
    parameter = torch.promote_types(make.dtype, torch.float32 if "float_weight" in flags else make.dtype)
    cu_seqlens = seq_idx = None
    if "packed" in flags:
        edges = [0, *(edge for edge in (3, 3, 4, 40) if edge < seqlen), seqlen]
        cu_seqlens = torch.tensor(edges, dtype=torch.int32, device=make.device)
    elif "seq_idx" in flags:
        steps = torch.arange(seqlen, dtype=torch.int32, device=make.device)
        seq_idx = torch.stack([(steps + 2 * row) // 5 - 2 * (steps // 7 % 2) for row in range(batch)])
    sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
    return (
        x if "channels_last" in flags else x.contiguous(),
        make(dim, width).to(parameter),
        make(dim).to(parameter) if "bias" in flags else None,
        make(sequences, dim, (width - 1) * dilation) if "initial_states" in flags else None,
        seq_idx,
        cu_seqlens,
        "silu" if "silu" in flags else "none",
        dilation,
        "final_states" in flags,
    )


PAIRWISE = [*("1101110"[i:] + "1101110"[:i] for i in range(7)), "0000000"]  # with seq_idx or packed as one flag


@samples(conv1d.causal_conv1d, degree=4)
def causal_conv1d_samples(make: Make) -> Iterator[tuple[Any, ...]]:
    yield arguments(make, 5, 4, 9, ("bias", "silu"))
    yield arguments(make, 5, 4, 9, ("bias", "silu", "channels_last"))
    for i, run in enumerate(PAIRWISE):
        on = [flag for flag, bit in zip((*FLAGS[:4], "split", *FLAGS[6:]), run, strict=True) if bit == "1"]
        for split in ("seq_idx", "packed") if "split" in on else ("none",):
            yield arguments(make, 3 + i, 2 + i % 4, 6 + i, (*on, split), dilation=1 + i % 3)
    every = ("bias", "silu", "initial_states", "final_states")
    for split in ("none", "seq_idx", "packed"):
        for dim, width, seqlen in [(1, 1, 1), (2, 3, 0), (3, 4, 1), (8, 2, 8), (9, 5, 31)]:
            for layout in ("none", "channels_last"):
                yield arguments(make, dim, width, seqlen, (*every, split, layout))
        yield arguments(make, 33, 4, 3, (*every, split, "channels_last"))
        yield arguments(make, 70, 3, 9, (*every, split, "channels_last"))
    for split in ("seq_idx", "packed"):
        yield arguments(make, 3, 9, 40, (*every, split), dilation=7)
    yield arguments(make, 3, 4, 16, every)
    yield arguments(make, 8, 4, 70, (*every, "channels_last"))
    yield arguments(make, 8, 2, 600, (*every, "channels_last"), batch=1, dilation=270)
    for seqlen in (511, 512, 513):
        yield arguments(make, 8, 4, seqlen, (*every, "seq_idx"), batch=1)
        yield arguments(make, 8, 4, seqlen, (*every, "packed", "channels_last"), dilation=2)
    if make.kind == "normal":
        yield arguments(make, 2, 4, 8192, ("bias", "silu"), batch=1)


@samples(conv1d.causal_conv1d_backward, degree=5)
def causal_conv1d_backward_samples(make: Make) -> Iterator[tuple[Any, ...]]:
    for args in itertools.islice(causal_conv1d_samples(make), 0, None, 3):  # the others' gradients are checked there
        *tensors, activation, dilation, final = args
        states = conv1d.causal_conv1d.definition(*args[:-1], True)[1].shape
        dfinal = make(*states) if final else None
        asked = [True, True, args[2] is not None, args[3] is not None]
        yield make(*args[0].shape), *tensors, dfinal, activation, dilation, asked
        if args[0].shape[1:] == (5, 9):
            for i in range(4):
                alone = [i == j for j in range(4)]
                bias, states = make(5).to(args[1].dtype), make(2, 5, 3)
                yield make(2, 5, 9), *args[:2], bias, states, None, None, None, activation, dilation, alone


def test_weight_and_bias_of_two_dtypes(device: str) -> None:
    make = Make(torch.bfloat16, device, "normal")
    x, weight, bias = make(2, 5, 9), make(5, 4), make(5)
    expected = F.causal_conv1d(x, weight.float(), bias.float())
    assert torch.equal(F.causal_conv1d(x, weight.float(), bias), expected)
    assert torch.equal(F.causal_conv1d(x, weight, bias.float()), expected)


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, states: Tensor, dilation: int) -> tuple[Tensor, Tensor]:
    """torch's conv1d over the states and x, and the states that follow."""
    joined = torch.cat([states, x], 2)
    y = torch.nn.functional.conv1d(joined, weight[:, None], bias, dilation=dilation, groups=x.shape[1])
    return y, joined[..., x.shape[2] :]


@pytest.mark.parametrize(("width", "dilation"), [(1, 1), (2, 1), (4, 1), (3, 5), (130, 2)])
def test_is_torchs_conv1d(width: int, dilation: int) -> None:
    make = Make(torch.float64)
    x, weight, bias = make(2, 5, 17), make(5, width), make(5)
    states = make(2, 5, (width - 1) * dilation)
    y, final = F.causal_conv1d(x, weight, bias, None, states, True, dilation=dilation)
    expected, last = reference(x, weight, bias, states, dilation)
    torch.testing.assert_close(y, expected)
    assert torch.equal(final, last)
    y = F.causal_conv1d(x, weight, activation="swish", dilation=dilation)
    expected, _ = reference(x, weight, None, torch.zeros_like(states), dilation)
    torch.testing.assert_close(y, torch.nn.functional.silu(expected))


@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_in_two_halves(dtype: torch.dtype, layout: str) -> None:
    make = Make(dtype)
    x = make(2, 23, 10).mT if layout == "last" else make(2, 10, 23)
    weight, bias = make(10, 4), make(10)
    whole, end = F.causal_conv1d(x, weight, bias, "silu", return_final_states=True)
    assert isinstance(whole, Tensor) and whole.stride() == x.stride()
    for middle in (0, 1, 2, 3, 11, 22, 23):
        first, states = F.causal_conv1d(x[..., :middle], weight, bias, "silu", return_final_states=True)
        second, last = F.causal_conv1d(x[..., middle:], weight, bias, "silu", states, return_final_states=True)
        torch.testing.assert_close(torch.cat([first, second], 2), whole)
        assert torch.equal(last, end)


@pytest.mark.parametrize("lengths", [[23], [5, 1, 0, 2, 15], [0, 0, 7, 16, 0]])
def test_packed_is_a_loop_over_sequences(lengths: list[int]) -> None:
    make = Make(torch.float32)
    x, weight, bias, states = make(1, 6, 23), make(6, 4), make(6), make(len(lengths), 6, 6)
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    leaves = [x, weight, bias, states]
    grads = []
    for packed in (True, False):
        inputs = [leaf.clone().requires_grad_() for leaf in leaves]
        one, w, b, s = inputs
        if packed:
            y, final = F.causal_conv1d(one, w, b, "silu", s, True, cu_seqlens=bounds, dilation=2)
        else:
            pieces = [
                F.causal_conv1d(part, w, b, "silu", state[None], True, dilation=2)
                for part, state in zip(one.split(lengths, 2), s, strict=True)
            ]
            y, final = torch.cat([p[0] for p in pieces], 2), torch.cat([p[1] for p in pieces])
        generator = torch.Generator().manual_seed(3)
        dy, dfinal = (torch.randn(t.shape, generator=generator) for t in (y, final))
        grads.append((y, final, *torch.autograd.grad([y, final], inputs, [dy, dfinal])))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["first", "last"])
def test_sequences_do_not_see_each_other(layout: str) -> None:
    index = torch.tensor([[0, 0, 0, 1, 1, 2, -1, -1, 3, 3, 3, 3]], dtype=torch.int32)
    make = Make(torch.float32)
    x = make(1, 12, 9).mT if layout == "last" else make(1, 9, 12)
    weight, states = make(9, 4), make(1, 9, 3)
    y = F.causal_conv1d(x, weight, None, "silu", states, seq_idx=index)
    for sequence in range(4):
        steps = index[0] == sequence
        alone = F.causal_conv1d(x[..., steps], weight, None, "silu", states if sequence == 0 else None)
        torch.testing.assert_close(y[..., steps], alone)
    assert not y[..., 6:8].any()
    spoiled = x.clone()
    spoiled[..., 3:5] = torch.nan
    y2 = F.causal_conv1d(spoiled, weight, None, "silu", states, seq_idx=index)
    torch.testing.assert_close(y2[..., index[0] != 1], y[..., index[0] != 1])
    bounds = torch.tensor([0, 3, 5, 12], dtype=torch.int32)
    packed = F.causal_conv1d(spoiled, weight, None, "silu", cu_seqlens=bounds)
    assert not packed[..., :3].isnan().any() and not packed[..., 5:].isnan().any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(4, 8)}, RuntimeError, r"x has shape \(4, 8\), accepted is \(batch, dim, seqlen\)"),
        ({"x": torch.zeros(2, 4, 8, dtype=torch.int32)}, RuntimeError, "x has dtype torch.int32"),
        ({"weight": torch.zeros(5, 4)}, RuntimeError, r"weight has shape \(5, 4\), accepted is \(dim, width\)"),
        ({"weight": torch.zeros(4, 0)}, RuntimeError, r"weight has shape \(4, 0\)"),
        ({"weight": torch.zeros(4, 4, dtype=torch.float16)}, RuntimeError, "weight has dtype torch.float16"),
        ({"bias": torch.zeros(3)}, RuntimeError, r"bias has shape \(3,\), accepted is \(dim,\) = \(4,\)"),
        ({"bias": torch.zeros(4, device="meta")}, RuntimeError, "bias is on meta"),
        ({"activation": "gelu"}, ValueError, "activation is 'gelu', accepted are None, 'silu' and 'swish'"),
        ({"dilation": 0}, ValueError, "dilation is 0"),
        (
            {"initial_states": torch.zeros(2, 4, 4)},
            RuntimeError,
            r"has shape \(2, 4, 4\), .*\(2, 4, 3\)",
        ),
        ({"initial_states": torch.zeros(2, 4, 3).double()}, RuntimeError, "initial_states has dtype torch.float64"),
        ({"seq_idx": torch.zeros(2, 7, dtype=torch.int32)}, RuntimeError, r"seq_idx has shape \(2, 7\)"),
        ({"seq_idx": torch.zeros(2, 8, dtype=torch.int64)}, RuntimeError, "seq_idx has dtype torch.int64"),
        ({"cu_seqlens": torch.tensor([0, 8], dtype=torch.int32)}, RuntimeError, "x has batch 2, accepted is 1"),
        ({"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)}, ValueError, r"cu_seqlens is \[0, 5\]"),
        ({"cu_seqlens": torch.tensor([0, 5, 3, 8], dtype=torch.int32)}, ValueError, "do not decrease"),
        ({"cu_seqlens": torch.tensor([0, 8])}, RuntimeError, "batch 2|cu_seqlens has dtype torch.int64"),
        (
            {"cu_seqlens": torch.tensor([0, 8], dtype=torch.int32), "seq_idx": torch.zeros(2, 8, dtype=torch.int32)},
            ValueError,
            "got seq_idx and cu_seqlens",
        ),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"x": torch.zeros(2, 4, 8), "weight": torch.zeros(4, 4), **change}
    with pytest.raises(error, match=message):
        F.causal_conv1d(**arguments)
