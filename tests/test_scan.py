"""The scans: samples for the contract, all combinations of flags, other formulas as the reference, bad input."""

import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import dlops
import dlops.functional as F
from dlops import backend, testing
from dlops.ops import scan
from dlops.testing import Make, samples

FLAGS = (
    "D",
    "z",
    "delta_bias",
    "delta_softplus",
    "constant_B",
    "constant_C",
    "grouped",
    "initial_state",
    "packed",
    "complex_A",
    "channels_last",
)
# Plackett and Burman's design of 12 runs: every two flags in all four combinations.
PAIRWISE = [*(["11011100010"[i:] + "11011100010"[:i] for i in range(11)]), "0" * 11]
EDGES = [0, 3, 3, 60]  # of packed sequences, one of them empty; the last goes on to the end


def arguments(
    make: Make, dim: int, dstate: int, seqlen: int, flags: Sequence[str] = (), batch: int = 2, groups: int = 2
) -> tuple[Any, ...]:
    """Arguments of the op, with the optional ones that ``flags`` name. A is negative and scaled so that the states
    decay by e per step on average, whatever delta's magnitude."""

    def per_step() -> Tensor:
        x = make(batch, seqlen, dim)
        return x.mT if "channels_last" in flags else x.mT.contiguous()

    def state(*shape: int) -> Tensor:
        x = make(*shape).to(torch.promote_types(make.dtype, torch.float32))
        return torch.complex(x, make(*shape).to(x.dtype)) if "complex_A" in flags else x

    def coefficient(constant: bool) -> Tensor:
        shape = (dim, dstate) if constant else (batch, groups if "grouped" in flags else 1, dstate, seqlen)
        return state(*shape) if constant or "complex_A" in flags else make(*shape)

    batch = 1 if "packed" in flags else batch
    softplus = "delta_softplus" in flags
    delta = per_step() if softplus else per_step().abs()
    delta_bias = state(dim).real if "delta_bias" in flags else None
    if delta_bias is not None and not softplus:
        delta_bias = delta_bias.abs()
    A = state(dim, dstate)
    rate = A.real.abs() + A.real.abs().mean() / 2 if A.numel() else A.real  # no state outlives all others by far
    A = torch.complex(-rate, A.imag) if A.is_complex() else -rate
    steps = scan._steps(delta, delta_bias, softplus)[0]
    if A.numel() and steps.numel():
        A = A / (steps.double().mean() * A.abs().double().mean())
    cu_seqlens = None
    if "packed" in flags:
        edges = [*(edge for edge in EDGES if edge < seqlen), seqlen]
        cu_seqlens = torch.tensor(edges, dtype=torch.int32, device=make.device)
    sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
    return (
        per_step(),
        delta,
        A,
        coefficient("constant_B" in flags),
        coefficient("constant_C" in flags),
        state(dim).real if "D" in flags else None,
        per_step() if "z" in flags else None,
        delta_bias,
        state(sequences, dim, dstate) if "initial_state" in flags else None,
        cu_seqlens,
        softplus,
        True,
    )


MAMBA = ("D", "z", "delta_bias", "delta_softplus", "channels_last")


@samples(scan.selective_scan, degree=6)
def selective_scan_samples(make: Make) -> Iterator[tuple[Any, ...]]:
    yield arguments(make, 6, 4, 7, (*MAMBA, "initial_state"))
    for i, run in enumerate(PAIRWISE):
        flags = [flag for flag, on in zip(FLAGS, run, strict=True) if on == "1"]
        yield arguments(make, 40 + 2 * (i % 3), 3 + i % 2, 7 + i % 4, flags)
    yield (*arguments(make, 12, 2, 3, (*MAMBA, "initial_state"), batch=1)[:-1], False)
    yield arguments(make, 8, 1, 4, ("z", "grouped", "constant_C", "packed", "complex_A"), batch=1)
    for dim, dstate, seqlen in [(1, 1, 1), (2, 3, 0), (23, 1, 3), (8, 2, 9), (9, 5, 3), (16, 4, 8), (33, 6, 7)]:
        yield arguments(make, dim, dstate, seqlen, ("D",))
        yield arguments(make, dim, dstate, seqlen, (*MAMBA, "initial_state"))
    yield arguments(make, 7, 256, 3, ("z", "initial_state"))
    for seqlen in (63, 64, 65):
        yield arguments(make, 15, 2, seqlen, ("z", "packed", "initial_state"), groups=1)
    yield arguments(make, 14, 17, 69, MAMBA, batch=1)
    yield arguments(make, 40, 3, 140, ("packed", "D", "complex_A"), groups=1)
    # Behind the fences of tests/fence.cpp the definition's backward would need more maps than a process may have.
    if make.kind == "normal" and make.dtype == torch.float32 and "DLOPS_FENCE" not in os.environ:
        yield arguments(make, 40, 1, 8192, MAMBA, batch=1)


@samples(scan.selective_scan_backward, degree=7)
def selective_scan_backward_samples(make: Make) -> Iterator[tuple[Any, ...]]:
    for args in selective_scan_samples(make):
        *tensors, softplus, _ = args
        _, last_state, checkpoints = scan.selective_scan.definition(*tensors, softplus, True)
        dlast_state = None
        if args[8] is not None:
            dlast_state = make(*last_state.shape).to(last_state.dtype)
        asked = [True] * 5 + [a is not None for a in args[5:9]]
        yield make(*args[0].shape), *tensors, dlast_state, checkpoints, softplus, asked
        if args[0].shape == (1, 12, 3):
            alone = [*tensors, dlast_state, checkpoints, softplus]
    dy = make(1, 12, 3)
    for i in range(9):
        yield dy, *alone, [i != j for j in range(9)]


def reference(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Another formula: y[t] = sum over s <= t of C[t] . exp(A (delta[s + 1] + ... + delta[t])) B[s] delta[s] u[s]."""
    total = delta.cumsum(-1)
    span = (total[..., :, None] - total[..., None, :]).tril()  # (batch, dim, t, s)
    decay = torch.exp(span[..., None] * A[:, None, None, :]) * torch.ones_like(span).tril()[..., None]
    return torch.einsum("bnt,bdtsn,bns,bds->bdt", C, decay, B, delta * u)


@pytest.mark.parametrize("name", ["torch", None])
def test_equal_to_the_sum_over_all_pairs_of_steps(name: str | None) -> None:
    for dtype in (torch.float64, torch.float32):
        u, delta, B, C = (torch.randn(2, n, 70, dtype=dtype) for n in (5, 5, 3, 3))
        delta, A = delta.abs(), -torch.rand(5, 3, dtype=dtype)
        with dlops.use_backend(name):
            torch.testing.assert_close(F.selective_scan(u, delta, A, B, C), reference(u, delta, A, B, C))


@pytest.mark.parametrize("name", ["cpu", "cuda", "triton"])
def test_a_sequence_begins_in_a_later_chunk(name: str) -> None:
    draws = []
    for seed in range(4):
        args = list(arguments(Make(torch.float32, seed=seed), 9, 2, 200, ("packed", "D"), groups=1))
        args[2] = args[2] / 100  # a state outlives its chunk
        args[9] = torch.tensor([0, 100, 200], dtype=torch.int32)
        draws.append(args)
    if reason := backend.refusal(scan.selective_scan, name, draws[0]):
        pytest.skip(reason)
    testing.check_ratios(scan.selective_scan, draws, name)


@pytest.mark.parametrize("rate", [-0.01, 0.01], ids=["decaying", "growing"])
@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_states_that_outlive_the_sequence(name: str, rate: float) -> None:
    """An error of a decay that has a bias adds up; numpy's exp2, which Triton's interpreter takes, has one."""
    draws = []
    for _ in range(8):
        u, delta = torch.randn(1, 4, 300), torch.rand(1, 4, 300)
        B, C = torch.randn(2, 1, 1, 3, 300)
        draws.append((u, delta, rate * torch.rand(4, 3), B, C, *[None] * 5, False, True))
    if reason := backend.refusal(scan.selective_scan, name, draws[0]):
        pytest.skip(reason)
    testing.check_ratios(scan.selective_scan, draws, name)


@pytest.mark.parametrize("name", backend.BACKENDS)
def test_absent_arguments_have_no_gradient_to_write(name: str) -> None:
    """Whatever output_mask asks for."""
    u, A, B = torch.randn(1, 2, 3), -torch.rand(2, 4), torch.randn(1, 1, 4, 3)
    arguments = (u, u.abs(), A, B, B, None, None, None, None, None)
    checkpoints = scan.selective_scan.definition(*arguments, False, True)[2]
    args = (u, *arguments, None, checkpoints, False, [True] * 9)
    if reason := backend.refusal(scan.selective_scan_backward, name, args):
        pytest.skip(reason)
    with dlops.use_backend(name):
        found = scan.selective_scan_backward(*args)
    expected = scan.selective_scan_backward.definition(*args)
    for i in (0, 1, 2, 3, 4, 8):
        torch.testing.assert_close(found[i], expected[i])


@pytest.mark.parametrize("name", ["torch", None])
def test_functional_composes_the_flags(name: str | None) -> None:
    u, delta, z = (torch.randn(2, 6, 9, dtype=torch.float64) for _ in range(3))
    A, D, bias = -torch.rand(6, 4).double(), torch.randn(6).double(), torch.randn(6).double()
    B, C, state = torch.randn(2, 4, 9).double(), torch.randn(2, 2, 4, 9).double(), torch.randn(2, 6, 4).double()
    B = B[:, None].repeat(1, 2, 1, 1)
    with dlops.use_backend(name):
        y, last = F.selective_scan(u, delta, A, B, C, D, z, bias, True, state, return_last_state=True)
        steps = torch.nn.functional.softplus(delta + bias[:, None])
        h, ys = state, []
        for t in range(9):
            Bt, Ct = (x[..., t].repeat_interleave(3, 1) for x in (B, C))
            h = torch.exp(steps[..., t, None] * A) * h + (steps * u)[..., t, None] * Bt
            ys.append(((h * Ct).sum(-1) + D * u[..., t]) * torch.nn.functional.silu(z[..., t]))
        torch.testing.assert_close((y, last), (torch.stack(ys, -1), h))


@pytest.mark.parametrize("name", ["torch", "cpu"])
@pytest.mark.parametrize("complex_A", [False, True])
def test_packed_sequences_equal_a_loop(name: str, complex_A: bool) -> None:
    if name not in scan.selective_scan.implementations or backend.missing(name):
        pytest.skip(f"no backend {name}")
    flags = ("packed", "D", "z", "initial_state", *(["complex_A"] if complex_A else []))
    args = list(arguments(Make(torch.float32), 5, 3, 150, flags, groups=1))
    leaves = [a.requires_grad_() if testing._floating(a) else a for a in args]
    u, delta, A, B, C, D, z, _, state, cu_seqlens, *_ = leaves
    with dlops.use_backend(name):
        y, last = F.selective_scan(*leaves[:8], False, state, True, cu_seqlens)
        bounds = cu_seqlens.tolist()
        alone = [
            F.selective_scan(
                *(x[..., begin:end] for x in (u, delta)),
                A,
                *(x[..., begin:end] for x in (B, C)),
                D,
                z[..., begin:end],
                initial_state=state[i : i + 1],
                return_last_state=True,
            )
            for i, (begin, end) in enumerate(itertools.pairwise(bounds))
        ]
        ys, lasts = torch.cat([one[0] for one in alone], -1), torch.cat([one[1] for one in alone])
        torch.testing.assert_close((y, last), (ys, lasts))
        inputs = [a for a in leaves if testing._floating(a)]
        dys = torch.randn_like(y), torch.randn_like(last)
        packed = torch.autograd.grad((y, last), inputs, dys)
        torch.testing.assert_close(packed, torch.autograd.grad((ys, lasts), inputs, dys), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("dim", "dstate", "seqlen", "flags"),
    [
        (130, 70, 3, (*MAMBA, "initial_state")),  # blocks of channels and of states; programs take several of them
        (6, 17, 140, ("D", "z", "grouped", "delta_softplus", "initial_state")),
        (5, 3, 70, ("packed", "z", "constant_B", "initial_state", "delta_bias")),
        (5, 3, 70, ("packed", "D", "constant_C")),
    ],
)
def test_blocks_on_triton(dim: int, dstate: int, seqlen: int, flags: Sequence[str], device: str) -> None:
    if reason := backend.missing("triton"):
        pytest.skip(reason)
    args = arguments(Make(torch.float32, device), dim, dstate, seqlen, flags)
    testing.check_ratios(scan.selective_scan, [args], "triton")


needs_cpu = pytest.mark.skipif(backend.missing("cpu") is not None, reason="dlops._C is not built")


@needs_cpu
@pytest.mark.parametrize(
    "fixed", itertools.product((False, True), repeat=6), ids=lambda on: "".join(map(str, map(int, on)))
)
def test_all_combinations_of_flags_on_cpu(fixed: Sequence[bool]) -> None:
    for free in itertools.product((False, True), repeat=len(FLAGS) - 6):
        flags = [flag for flag, on in zip(FLAGS, (*fixed, *free), strict=True) if on]
        if not {"constant_B", "constant_C", "grouped"} <= set(flags):
            testing.check_ratios(scan.selective_scan, [arguments(Make(), 250, 5, 5, flags)], "cpu")


@needs_cpu
@pytest.mark.parametrize("complex_A", [False, True])
def test_blocks_on_cpu(complex_A: bool) -> None:
    """Of several vectors of channels, through several segments of time."""
    flags = (*MAMBA, "initial_state", *(["complex_A"] if complex_A else []))
    testing.check_ratios(scan.selective_scan, [arguments(Make(), 300, 3, 150, flags)], "cpu")


@needs_cpu
def test_threads_and_blocks_do_not_change_bits() -> None:
    """Many blocks of channels, several checkpoints: more than one thread has work."""
    leaves = [
        a.requires_grad_() if testing._floating(a) else a
        for a in arguments(Make(torch.float32), 300, 18, 270, (*MAMBA, "initial_state", "grouped"))
    ]
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with dlops.use_backend("cpu"):
                y, last, _ = scan.selective_scan(*leaves)
                inputs = [a for a in leaves if testing._floating(a)]
                gradients = torch.autograd.grad((y, last), inputs, (torch.ones_like(y), torch.ones_like(last)))
            results.append((y, last, *gradients))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, rtol=0, atol=0)


@needs_cpu
@pytest.mark.parametrize("dstate", [1, 16, 17, 64, 256])
def test_memory_does_not_grow_with_dstate(dstate: int) -> None:
    """Checkpoints, and what the backward sums dB and dC from, stay within u's size."""
    args = arguments(Make(torch.float32), 512, dstate, 1024, MAMBA, batch=1)
    with dlops.use_backend("cpu"):
        checkpoints = scan.selective_scan(*args)[2]
    assert checkpoints.numel() <= args[0].numel() / 4


def kernel_decay(exponent: Tensor) -> Tensor:
    """exp(delta A) as the cpu kernel computes it: after one step, the state that was 1."""
    dim = len(exponent)
    zero = torch.zeros(1, dim, 1)
    one = torch.ones(1, dim, 1, dtype=exponent.dtype)
    with dlops.use_backend("cpu"):
        return F.selective_scan(
            zero, zero + 1, exponent[:, None], one[0], one[0], initial_state=one, return_last_state=True
        )[1].flatten()


@needs_cpu
def test_the_kernels_exponential() -> None:
    """The largest error in units of the last place over the whole range, in vectors of moderate exponents or not."""
    moderate = torch.cat([torch.linspace(-87, 87, 400_000), torch.linspace(-1e-3, 1e-3, 100_001)])
    whole = torch.cat([torch.linspace(-107, 93, 400_000), torch.randn(100_000) * 40])
    far = torch.stack([whole, torch.full_like(whole, 92)], 1).flatten()  # every vector has exponents beyond
    for x in (moderate, far):
        found, exact = kernel_decay(x), torch.exp(x.double())
        finite = exact < torch.finfo(torch.float32).max
        assert found[~finite].isinf().all()
        found, exact = found[finite].double(), exact[finite]
        assert found.isfinite().all()
        ulp = torch.exp2(exact.log2().floor().clamp(min=-126) - 23)
        assert ((found - exact).abs() / ulp).max() <= 0.9
    inf, nan = float("inf"), float("nan")
    assert torch.equal(kernel_decay(torch.tensor([-inf, 0.0, -1e30, inf, 1e30])), torch.tensor([0.0, 1, 0, inf, inf]))
    assert kernel_decay(torch.tensor([nan] + [-1.0] * 20)).isnan().tolist() == [True] + [False] * 20


@needs_cpu
def test_the_kernels_complex_exponential() -> None:
    """The largest error of its parts in units of float32's eps, whatever the angle."""
    for scale in (1, 1e3, 1e6):
        angle = torch.randn(100_000) * scale
        found = kernel_decay(torch.complex(torch.zeros_like(angle), angle))
        exact = torch.polar(torch.ones_like(angle).double(), angle.double())
        assert torch.view_as_real(found - exact).abs().max() <= 0.75 * torch.finfo(torch.float32).eps
    for angle in (1e20, float("inf"), float("nan")):
        found = kernel_decay(torch.tensor([complex(0, angle), complex(-1, 1)]))
        assert found[0].abs().isfinite() == (angle == 1e20) and found[1].abs().isfinite()
        assert not found[0].abs() > 1.001


def test_no_steps_return_the_initial_state() -> None:
    state = torch.randn(2, 3, 4)
    y, last = F.selective_scan(
        torch.randn(2, 3, 0),
        torch.randn(2, 3, 0),
        -torch.rand(3, 4),
        torch.randn(2, 4, 0),
        torch.randn(2, 4, 0),
        initial_state=state,
        return_last_state=True,
    )
    assert y.shape == (2, 3, 0)
    assert torch.equal(last, state) and last.data_ptr() != state.data_ptr()


def call(**changes: Any) -> Any:
    """dlops.functional.selective_scan on good arguments but for ``changes``."""
    make = {
        "u": torch.randn(2, 6, 5),
        "delta": torch.rand(2, 6, 5),
        "A": -torch.rand(6, 4),
        "B": torch.randn(2, 3, 4, 5),
        "C": torch.randn(2, 3, 4, 5),
    }
    return F.selective_scan(**(make | changes))


def packed(*bounds: int, dtype: torch.dtype = torch.int32, **changes: Any) -> Any:
    make = {name: torch.rand(1, n, 5) for name, n in (("u", 6), ("delta", 6), ("B", 4), ("C", 4))}
    return F.selective_scan(
        **(make | {"A": -torch.rand(6, 4), "cu_seqlens": torch.tensor(bounds, dtype=dtype)} | changes)
    )


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (lambda: call(), None, ""),
        (lambda: packed(0, 2, 5), None, ""),
        (lambda: call(u=torch.randn(6, 5)), RuntimeError, r"u has shape \(6, 5\), accepted is \(batch, dim, seqlen\)"),
        (lambda: call(u=torch.ones(2, 6, 5, dtype=torch.int64)), RuntimeError, "u has dtype torch.int64"),
        (
            lambda: call(delta=torch.rand(2, 6, 4)),
            RuntimeError,
            r"delta has shape \(2, 6, 4\), accepted is \(batch, dim, seqlen\) = \(2, 6, 5\)",
        ),
        (lambda: call(delta=torch.rand(2, 6, 5).double()), RuntimeError, "delta has dtype torch.float64"),
        (
            lambda: call(A=torch.rand(5, 4)),
            RuntimeError,
            r"A has shape \(5, 4\), accepted is \(dim, dstate\) = \(6, at",
        ),
        (lambda: call(A=torch.rand(6, 257)), RuntimeError, "at most 256"),
        (
            lambda: call(B=torch.rand(2, 3, 4, 6)),
            RuntimeError,
            r"B has shape \(2, 3, 4, 6\), accepted is \(dim, dstate\) = \(6, 4\) or "
            r"\(batch, groups, dstate, seqlen\) = \(2, 3, 4, 5\)",
        ),
        (lambda: call(C=torch.rand(2, 2, 4, 5)), RuntimeError, r"C has shape \(2, 2, 4, 5\)"),
        (lambda: call(B=torch.rand(2, 4, 4, 5)), RuntimeError, "B has 4 groups, accepted are divisors of dim = 6"),
        (lambda: call(D=torch.rand(5)), RuntimeError, r"D has shape \(5,\), accepted is \(dim,\) = \(6,\)"),
        (lambda: call(z=torch.rand(2, 5, 6)), RuntimeError, r"z has shape \(2, 5, 6\)"),
        (lambda: call(delta_bias=torch.rand(6, 1)), RuntimeError, r"delta_bias has shape \(6, 1\)"),
        (lambda: call(D=torch.rand(6) + 0j), RuntimeError, "D has dtype torch.complex64, accepted is torch.float32"),
        (lambda: call(B=torch.rand(6, 4) + 0j), RuntimeError, "B has dtype torch.complex64, accepted is torch.float32"),
        (lambda: call(A=torch.rand(6, 4) + 0j), RuntimeError, "B has dtype torch.float32, accepted is torch.complex64"),
        (lambda: call(A=torch.rand(6, 4, device="meta")), RuntimeError, "A is on meta, accepted is u's device, cpu"),
        (
            lambda: call(initial_state=torch.rand(1, 6, 4)),
            RuntimeError,
            r"initial_state has shape \(1, 6, 4\), accepted is \(batch, dim, dstate\) = \(2, 6, 4\)",
        ),
        (lambda: call(initial_state=torch.rand(2, 6, 4).half()), RuntimeError, "initial_state has dtype torch.float16"),
        (lambda: call(cu_seqlens=torch.tensor([0, 5])), RuntimeError, "u has batch 2, accepted is 1 with cu_seqlens"),
        (lambda: packed(0, 5, dtype=torch.int64), RuntimeError, "cu_seqlens has dtype torch.int64"),
        (lambda: packed(), RuntimeError, r"cu_seqlens has shape \(0,\), accepted is \(num_sequences \+ 1,\)"),
        (
            lambda: packed(1, 5),
            ValueError,
            r"cu_seqlens is \[1, 5\], accepted are numbers that do not decrease, from 0",
        ),
        (lambda: packed(0, 4), ValueError, "from 0 to 5"),
        (lambda: packed(0, 5, u=torch.tensor(1.0)), RuntimeError, r"u has shape \(\)"),
        (lambda: packed(0, 4, 3, 5), ValueError, "do not decrease"),
        (
            lambda: packed(0, 2, 5, initial_state=torch.rand(1, 6, 4)),
            RuntimeError,
            r"accepted is \(num_sequences, dim, dstate\) = \(2, 6, 4\)",
        ),
    ],
)
def test_bad_input(bad: Any, error: type[Exception] | None, message: str) -> None:
    if error is None:
        assert bad().isfinite().all()
        return
    with pytest.raises(error, match=message):
        bad()
