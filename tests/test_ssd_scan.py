"""The scan of Mamba-2: samples for the contract, the chunked formula and selective_scan as references, bad input."""

import importlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import dlops
import dlops.functional as F
from dlops import backend, testing
from dlops._op import acc
from dlops.ops import ssd_scan
from dlops.testing import DTYPES, KINDS, Make, samples

FLAGS = ("D", "D_varies", "z", "dt_bias", "dt_softplus", "limit", "initial_states", "packed", "groups", "float_dt")
# Plackett and Burman's design of 12 runs: every two flags in all four combinations.
PAIRWISE = [*(["11011100010"[i:] + "11011100010"[:i] for i in range(11)]), "0" * 11]
EDGES = [0, 3, 3, 70]  # of packed sequences, one of them empty; the last goes on to the end


def arguments(
    make: Make,
    heads: int,
    headdim: int,
    dstate: int,
    seqlen: int,
    flags: Sequence[str] = (),
    batch: int = 2,
    groups: int = 2,
) -> tuple[Any, ...]:
    """Arguments of the op, with the optional ones that ``flags`` name. A is negative and scaled so that the states
    decay by e per step on average, whatever dt's magnitude. Where values have a large mean, that of all but x is scaled
    to 1: products of many would leave float16's range, and what is out of range does not count."""

    def unit(*shape: int) -> Tensor:
        return make(*shape) / (100 if make.kind == "mean100" else 1)

    batch = 1 if "packed" in flags else batch
    groups = groups if "groups" in flags else 1
    softplus = "dt_softplus" in flags
    dt = unit(batch, seqlen, heads) if softplus else unit(batch, seqlen, heads).abs()
    dt = acc(dt) if "float_dt" in flags else dt
    dt_bias = acc(unit(heads)) if "dt_bias" in flags else None
    dt_bias = dt_bias if dt_bias is None or softplus else dt_bias.abs()
    A = acc(unit(heads)).abs()
    A = A + A.mean() / 2 if heads else A
    steps = ssd_scan._steps(dt, dt_bias, softplus, 0.0, math.inf)[0].double()
    if heads and seqlen and batch:
        A = A / ((steps.mean() + dt.abs().double().mean()) / 2 * A.double().mean())
    limit = (float(steps.mean()) / 2, float(steps.mean()) * 2) if "limit" in flags else (0.0, math.inf)
    cu_seqlens = None
    if "packed" in flags:
        edges = [*(edge for edge in EDGES if edge < seqlen), seqlen]
        cu_seqlens = torch.tensor(edges, dtype=torch.int32, device=make.device)
    sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
    D = unit(heads, headdim) if "D_varies" in flags else unit(heads) if "D" in flags else None
    return (
        make(batch, seqlen, heads, headdim),
        dt,
        -A.to(acc(dt).dtype),
        unit(batch, seqlen, groups, dstate),
        unit(batch, seqlen, groups, dstate),
        None if D is None else acc(D),
        unit(batch, seqlen, heads, headdim) if "z" in flags else None,
        dt_bias,
        acc(unit(sequences, heads, headdim, dstate)) if "initial_states" in flags else None,
        cu_seqlens,
        softplus,
        *limit,
    )


MAMBA = ("D", "z", "dt_bias", "dt_softplus")


@samples(ssd_scan.ssd_scan, degree=6)
def ssd_scan_samples(make: Make) -> Iterator[tuple[Any, ...]]:
    yield arguments(make, 3, 4, 6, 5, (*MAMBA, "initial_states"))  # no other dimension is the batch's 2
    yield arguments(make, 3, 2, 4, 3, (*MAMBA, "initial_states"))
    for i, run in enumerate(PAIRWISE):
        flags = [flag for flag, on in zip(FLAGS, run[:10], strict=True) if on == "1"]
        yield arguments(make, 4, 5 + i % 3, 3 + i % 2, 9 + i % 4, flags, 2 - (i % 4 > 0))
    yield arguments(make, 1, 1, 1, 1, ("D",))
    yield arguments(make, 2, 3, 4, 0, ("initial_states",))
    yield arguments(make, 2, 8, 3, 75, ("packed", "initial_states", "z", "D"))
    for seqlen in (65, 130):
        yield arguments(make, 2, 3, 8, seqlen, (*MAMBA, "initial_states"), batch=1)
    for headdim, dstate in [(16, 16), (33, 65), (5, 256)]:
        yield arguments(make, 1, headdim, dstate, 20, ("D_varies", "z", "initial_states"), batch=1)


def large_samples(make: Make) -> Iterator[tuple[Any, ...]]:
    """What Triton's interpreter would take minutes for: heads enough for several tasks, and long sequences."""
    for i, run in enumerate(PAIRWISE):
        flags = [flag for flag, on in zip(FLAGS, run[:10], strict=True) if on == "1"]
        yield arguments(make, 6 + 2 * (i % 2), 5 + i % 3, 3 + i % 2, 9 + i % 4, flags)
    for seqlen in (63, 64, 65, 130):
        yield arguments(make, 12, 3, 8, seqlen, (*MAMBA, "initial_states"))
    for headdim, dstate in [(16, 16), (17, 33), (33, 15), (64, 128), (5, 256)]:
        yield arguments(make, 20, headdim, dstate, 20, ("D_varies", "z", "initial_states"), batch=1)
    if make.kind == "normal" and make.dtype == torch.float32:
        yield arguments(make, 8, 3, 2, 2100, (*MAMBA, "initial_states"), batch=1)


@samples(ssd_scan.ssd_scan_backward, degree=7)
def ssd_scan_backward_samples(make: Make) -> Iterator[tuple[Any, ...]]:
    for i, args in enumerate(ssd_scan_samples(make)):
        if i > 0 and i % 3 != 2:  # the op's own samples try the gradients of all
            continue
        *tensors, softplus, low, high = args
        dfinal = None if args[8] is None else make(*args[8].shape).to(args[8].dtype)
        asked = [True] * 5 + [a is not None for a in args[5:9]]
        yield make(*args[0].shape), *tensors, dfinal, softplus, low, high, asked
        if i == 0:
            for left_out in range(9):
                alone = [left_out != j and on for j, on in enumerate(asked)]
                yield make(*args[0].shape), *tensors, dfinal, softplus, low, high, alone


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["cpu", "triton"])
def test_error_ratio_of_many_heads(
    name: str, dtype: torch.dtype, kind: str, device: str, record_ratios: Callable[[list[testing.Ratio]], None]
) -> None:
    if (reason := backend.missing(name)) is not None or (name == "triton" and backend.triton_interpreted()):
        pytest.skip(reason or "the interpreter takes minutes")
    device = "cpu" if name == "cpu" else device
    makes = [Make(dtype, device, kind, seed, 0.8 / 6) for seed in range(4)]
    for draws in zip(*[large_samples(make) for make in makes], strict=True):
        few = draws[0][0].numel() < 1000
        record_ratios(testing.check_ratios(ssd_scan.ssd_scan, draws if few else draws[:1], name))


def test_blocks_on_triton(device: str) -> None:
    """Packed sequences, one of two chunks; one more channel and state than a tile has; heads of two groups. Then more
    of one group, that programs share, each of which has several."""
    if (reason := backend.missing("triton")) is not None:
        pytest.skip(reason)
    tiles = importlib.import_module("dlops.kernels.ssd_tiles")
    tile = tiles.INTERPRETED_TILES if backend.triton_interpreted() else tiles.STATE_TILES["ieee"][0]
    flags = (*MAMBA, "D_varies", "initial_states", "packed", "groups")
    args = arguments(Make(device=device), 4, tile.block_p + 1, tile.block_n + 1, tiles.CHUNK.value + 6, flags)
    testing.check_ratios(ssd_scan.ssd_scan, [args], "triton")
    testing.check_ratios(ssd_scan.ssd_scan, [arguments(Make(device=device), 6, 3, 4, 5, MAMBA)], "triton")


def chunked(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Dao and Gu's section 6 in plain torch, for one group; seqlen is a multiple of the chunk."""
    batch, seqlen, heads, headdim = x.shape
    x, dt = x.unflatten(1, (-1, chunk)), dt.unflatten(1, (-1, chunk))
    B, C = (t[:, :, 0].unflatten(1, (-1, chunk)) for t in (B, C))
    cum = (dt * A).cumsum(2)
    span = (cum[:, :, :, None] - cum[:, :, None]).masked_fill(
        ~torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()[..., None], -math.inf
    )
    y = torch.einsum("bctn,bcsn,bctsh,bcsh,bcshp->bcthp", C, B, span.exp(), dt, x)
    update = torch.einsum("bcsn,bcsh,bcshp->bchpn", B, (cum[:, :, -1:] - cum).exp() * dt, x)
    state, states = x.new_zeros(batch, heads, headdim, B.shape[-1]), []
    for i in range(seqlen // chunk):
        states.append(state)
        state = cum[:, i, -1].exp()[..., None, None] * state + update[:, i]
    y = y + torch.einsum("bctn,bcth,bchpn->bcthp", C, cum.exp(), torch.stack(states, 1))
    return y.flatten(1, 2), state


@pytest.mark.parametrize("name", ["torch", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equal_to_the_chunked_form(dtype: torch.dtype, name: str | None) -> None:
    x, dt, A, B, C, *_ = arguments(Make(dtype), 3, 7, 5, 192)
    leaves = [t.requires_grad_() for t in (x, dt, A, B, C)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    with dlops.use_backend(name):
        ours = F.ssd_scan(*leaves, return_final_states=True)
        dys = [torch.randn_like(t) for t in ours]
        found = [*ours, *torch.autograd.grad(ours, leaves, dys)]
    theirs = chunked(*exact, 48)
    expected = [*theirs, *torch.autograd.grad(theirs, exact, [dy.double() for dy in dys])]
    for y, y64 in zip(found, expected, strict=True):
        assert (y - y64).abs().max() <= 256 * torch.finfo(dtype).eps * y64.abs().max()


@pytest.mark.parametrize("name", ["torch", None])
def test_equal_to_selective_scan(name: str | None) -> None:
    """With heads of one channel, and every flag."""
    x, dt, A, B, C, D, z, bias, state, *_ = arguments(Make(torch.float64), 6, 1, 4, 20, (*MAMBA, "initial_states"))
    with dlops.use_backend(name):
        y, final = F.ssd_scan(x, dt, A, B, C, D, z, bias, True, initial_states=state, return_final_states=True)
        u, delta, gate = (t.flatten(2).mT for t in (x, dt[..., None], z))
        expected = F.selective_scan(
            u,
            delta,
            A[:, None].expand(6, 4),
            *(t.permute(0, 2, 3, 1) for t in (B, C)),
            D,
            gate,
            bias,
            True,
            state[:, :, 0],
            True,
        )
        torch.testing.assert_close((y[..., 0].mT, final[:, :, 0]), expected)


@pytest.mark.parametrize("name", ["torch", None])
def test_packed_sequences_equal_a_loop(name: str | None) -> None:
    args = list(arguments(Make(), 4, 9, 6, 150, ("packed", "initial_states", "z", "D")))
    leaves = [a.requires_grad_() if testing._floating(a) else a for a in args]
    x, dt, A, B, C, D, z, _, states, cu_seqlens, *_ = leaves
    with dlops.use_backend(name):
        y, final = F.ssd_scan(*leaves[:7], initial_states=states, return_final_states=True, cu_seqlens=cu_seqlens)
        alone = [
            F.ssd_scan(
                *(t[:, begin:end] for t in (x, dt)),
                A,
                *(t[:, begin:end] for t in (B, C)),
                D,
                z[:, begin:end],
                initial_states=states[i : i + 1],
                return_final_states=True,
            )
            for i, (begin, end) in enumerate(itertools.pairwise(cu_seqlens.tolist()))
        ]
        ys, finals = torch.cat([one[0] for one in alone], 1), torch.cat([one[1] for one in alone])
        torch.testing.assert_close((y, final), (ys, finals))
        inputs = [a for a in leaves if testing._floating(a)]
        dys = torch.randn_like(y), torch.randn_like(final)
        packed = torch.autograd.grad((y, final), inputs, dys)
        torch.testing.assert_close(packed, torch.autograd.grad((ys, finals), inputs, dys), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["torch", None])
def test_seq_idx_equals_a_loop(name: str | None) -> None:
    x, dt, A, B, C, D, z, _, states, *_ = arguments(Make(), 4, 9, 6, 20, ("initial_states", "z", "D"))
    seq_idx = torch.tensor([[3] * 7 + [1] * 13, [0] * 2 + [1] + [0] * 17], dtype=torch.int32)
    edges = [[0, 7, 20], [0, 2, 3, 20]]
    with dlops.use_backend(name):
        y, final = F.ssd_scan(x, dt, A, B, C, D, z, initial_states=states, return_final_states=True, seq_idx=seq_idx)
        for i in range(2):
            for begin, end in itertools.pairwise(edges[i]):
                here = slice(i, i + 1), slice(begin, end)
                alone, last = F.ssd_scan(
                    *(t[here] for t in (x, dt)),
                    A,
                    *(t[here] for t in (B, C)),
                    D,
                    z[here],
                    initial_states=states[i : i + 1] if begin == 0 else None,
                    return_final_states=True,
                )
                torch.testing.assert_close(y[here], alone)
                if end == 20:
                    torch.testing.assert_close(final[i : i + 1], last)


def test_no_steps_return_the_initial_states() -> None:
    state = torch.randn(2, 3, 4, 5)
    nothing = torch.randn(2, 0, 1, 5)
    for seq_idx in (None, torch.zeros(2, 0, dtype=torch.int32)):
        y, final = F.ssd_scan(
            torch.randn(2, 0, 3, 4),
            torch.randn(2, 0, 3),
            -torch.rand(3),
            nothing,
            nothing,
            initial_states=state,
            return_final_states=True,
            seq_idx=seq_idx,
        )
        assert y.shape == (2, 0, 3, 4)
        assert torch.equal(final, state) and final.data_ptr() != state.data_ptr()


@pytest.mark.parametrize("name", ["torch", None])
def test_a_step_that_forgets_everything(name: str | None) -> None:
    """Decays that differ by more than float can add up: the steps after an endless one are as exact as without it."""
    x, dt, A, B, C, *_ = arguments(Make(), 3, 7, 5, 100)
    dt[:, 30] = 1e30
    with dlops.use_backend(name):
        y = F.ssd_scan(x, dt, A, B, C)[:, 31:]
        exact = F.ssd_scan(*(t.double() for t in (x, dt, A, B, C)))[:, 31:]
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e20)
    assert (exact.abs() > 1e22).any()


@pytest.mark.parametrize("name", ["torch", None])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_stays_in_its_sequence_and_head(bad: float, name: str | None) -> None:
    x, dt, A, B, C, *_, cu_seqlens, _, _, _ = arguments(Make(), 5, 9, 5, 200, ("packed",))
    for poisoned in (x, B):
        t = poisoned.clone()
        t[:, 71:100, :1] = bad  # the last sequence, of all heads if it is B
        with dlops.use_backend(name):
            clean = F.ssd_scan(x, dt, A, B, C, cu_seqlens=cu_seqlens)
            dirty = F.ssd_scan(t if poisoned is x else x, dt, A, t if poisoned is B else B, C, cu_seqlens=cu_seqlens)
        assert not dirty[:, 71:100, 0].isfinite().any()
        torch.testing.assert_close(dirty[:, :70], clean[:, :70], rtol=0, atol=0)
        if poisoned is x:
            torch.testing.assert_close(dirty[:, :, 1:], clean[:, :, 1:], rtol=0, atol=0)


@pytest.mark.skipif(backend.missing("cpu") is not None, reason="dlops._C is not built")
def test_threads_do_not_change_bits() -> None:
    leaves = [
        a.requires_grad_() if testing._floating(a) else a
        for a in arguments(Make(), 24, 16, 18, 200, (*MAMBA, "initial_states", "groups"))
    ]
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with dlops.use_backend("cpu"):
                y, final = ssd_scan.ssd_scan(*leaves)
                inputs = [a for a in leaves if testing._floating(a)]
                gradients = torch.autograd.grad((y, final), inputs, (torch.ones_like(y), torch.ones_like(final)))
            results.append((y, final, *gradients))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, rtol=0, atol=0)


def call(**changes: Any) -> Any:
    """dlops.functional.ssd_scan on good arguments but for ``changes``."""
    good = {
        "x": torch.randn(2, 5, 6, 3),
        "dt": torch.rand(2, 5, 6),
        "A": -torch.rand(6),
        "B": torch.randn(2, 5, 3, 4),
        "C": torch.randn(2, 5, 3, 4),
    }
    return F.ssd_scan(**(good | changes))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.rand(2, 5, 6)}, RuntimeError, r"x has shape \(2, 5, 6\), accepted is \(batch, seqlen, nheads, h"),
        ({"x": torch.ones(2, 5, 6, 3).int()}, RuntimeError, "x has dtype torch.int32"),
        ({"dt": torch.rand(2, 5, 5)}, RuntimeError, r"dt has shape \(2, 5, 5\), accepted is \(batch, seqlen, nheads\)"),
        ({"dt": torch.rand(2, 5, 6).half()}, RuntimeError, "dt has dtype torch.float16"),
        ({"A": torch.rand(6, 1)}, RuntimeError, r"A has shape \(6, 1\), accepted is \(nheads,\) = \(6,\)"),
        ({"B": torch.rand(2, 5, 4, 4)}, RuntimeError, "groups that divide nheads = 6"),
        ({"B": torch.rand(2, 5, 3, 257)}, RuntimeError, "at most 256"),
        ({"C": torch.rand(2, 5, 3, 5)}, RuntimeError, r"C has shape \(2, 5, 3, 5\), accepted is \(batch, seqlen, ng"),
        ({"D": torch.rand(5)}, RuntimeError, r"accepted is \(nheads,\) = \(6,\) or \(nheads, headdim\) = \(6, 3\)"),
        ({"z": torch.rand(2, 5, 3, 6)}, RuntimeError, r"z has shape \(2, 5, 3, 6\)"),
        ({"dt_bias": torch.rand(5)}, RuntimeError, r"dt_bias has shape \(5,\)"),
        ({"initial_states": torch.rand(1, 6, 3, 4)}, RuntimeError, r"\(batch, nheads, headdim, dstate\) = \(2, 6, 3,"),
        ({"cu_seqlens": torch.tensor([0, 5])}, RuntimeError, "x has batch 2, accepted is 1 with cu_seqlens"),
        ({"cu_seqlens": torch.tensor([0, 4]).int()}, ValueError, "from 0 to 5"),
        ({"seq_idx": torch.zeros(2, 5)}, RuntimeError, "seq_idx has dtype torch.float32"),
        ({"seq_idx": torch.zeros(5, 0).int()}, RuntimeError, r"seq_idx has shape \(5, 0\), accepted is \(batch"),
        (
            {"seq_idx": torch.zeros(2, 4).int()},
            RuntimeError,
            r"seq_idx has shape \(2, 4\), accepted is \(batch",
        ),
        (
            {"seq_idx": torch.zeros(2, 5).int(), "z": torch.rand(2, 5, 3, 6)},
            RuntimeError,
            r"z has shape \(2, 5, 3, 6\)",
        ),
        (
            {"seq_idx": torch.zeros(2, 5).int(), "cu_seqlens": torch.tensor([0, 5]).int()},
            ValueError,
            "got seq_idx and cu_seqlens, accepted is one of them",
        ),
    ],
)
def test_bad_input(changes: dict[str, Tensor], error: type[Exception], message: str) -> None:
    assert call().isfinite().all()
    with pytest.raises(error, match=message):
        call(**changes)
