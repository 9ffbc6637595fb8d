"""The CUDA kernels at the edges of their static table: on a GPU, else emulated on the host."""

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import dlops
from dlops import backend, testing
from dlops._op import Op
from dlops.ops import linear, norm, scan
from dlops.testing import Make

pytestmark = pytest.mark.skipif(backend.missing("cuda") is not None, reason=str(backend.missing("cuda")))

DTYPES = (torch.float32, torch.bfloat16)  # float16 has bfloat16's layouts
EMULATED = backend.cuda_emulated()


def table(kernel: str) -> list[dict[str, int]]:
    if backend.missing("cuda") is not None:
        return []
    rows = importlib.import_module("dlops._simt" if EMULATED else "dlops._cuda").kernel_table()
    return [row for row in rows if row["kernel"] == kernel]


def edges(kernel: str) -> list[Any]:
    """(dtype, rows, width) just within and just beyond each configuration, for 16-byte and for single accesses."""
    found = []
    for row in table(kernel):
        if row["width"] == 0:
            continue
        dtype = next(d for d in DTYPES if d.itemsize == row["element_bytes"])
        vec = row["access_bytes"] // row["element_bytes"]
        for width in (row["width"], row["width"] + vec) if vec > 1 else (row["width"] - 1, row["width"] + 1):
            found.append(pytest.param(dtype, row["rows"] + 1, width, id=f"{dtype}-{row['rows'] + 1}x{width}"))
    return found


def check(op: Op, *args: Any) -> None:
    testing.check_ratios(op, [args], "cuda")


def vectors(make: Make, width: int, count: int) -> list[Tensor]:
    return [make(width) for _ in range(count)]


@pytest.mark.parametrize(("dtype", "rows", "width"), edges("norm_forward"))
def test_norm_forward_edges(dtype: torch.dtype, rows: int, width: int, device: str) -> None:
    make = Make(dtype, device, "mean100")
    x, residual = make(rows, width), make(rows, width)
    with torch.no_grad():
        check(norm.add_layer_norm, x, residual, *vectors(make, width, 2), 1e-5)
        check(norm.rms_norm, x, None, 1e-6)


def backward_args(make: Make, rows: int, width: int) -> tuple[list[Any], list[Any]]:
    """Arguments of layer_norm_backward and of rms_norm_backward."""
    dy, x, weight, dsum = make(rows, width), make(rows, width), make(width), make(rows, width)
    _, mean, rstd = norm.layer_norm.definition(x, weight, None, 1e-5)
    _, rms = norm.rms_norm.definition(x, weight, 1e-5)
    return [dy, x, weight, mean, rstd, dsum, [True, True, True]], [dy, x, weight, rms, None, [True, True]]


@pytest.mark.parametrize(("dtype", "rows", "width"), edges("norm_backward"))
def test_norm_backward_edges(dtype: torch.dtype, rows: int, width: int, device: str) -> None:
    layer, rms = backward_args(Make(dtype, device), rows, width)
    check(norm.layer_norm_backward, *layer)
    check(norm.rms_norm_backward, *rms)


# Emulated, a block has 99 KiB of shared memory: rows of 20,000 wait there whole or in part, wider ones are read again.
@pytest.mark.parametrize("width", [20_000, 20_001, 65_536, 70_001])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["normal", "mean100"])
def test_wide_rows(kind: str, dtype: torch.dtype, width: int, device: str) -> None:
    make = Make(dtype, device, kind)
    x = make(2, width)
    with torch.no_grad():
        check(norm.add_layer_norm, x, make(2, width), *vectors(make, width, 2), 1e-5)
        check(norm.rms_norm, x, make(width), 1e-6)
    layer, rms = backward_args(make, 2, width)
    check(norm.layer_norm_backward, *layer)
    check(norm.rms_norm_backward, *rms)


def test_a_mean_of_many_deviations(device: str) -> None:
    """In a row that is read in chunks, what is subtracted before sums are taken must be near the mean."""
    make = Make(torch.float32, device)
    check(norm.layer_norm, make(8, 20_000) + 40_014, None, None, 1e-5)


@pytest.mark.parametrize("mask", [[True, False, False], [False, True, False], [False, False, True], [False] * 3])
@pytest.mark.parametrize("width", [24, 9000])
def test_only_what_is_asked_for(width: int, mask: list[bool], device: str) -> None:
    args, _ = backward_args(Make(torch.bfloat16, device), 3, width)
    with dlops.use_backend("cuda"):
        full = norm.layer_norm_backward(*args)
        some = norm.layer_norm_backward(*args[:-1], mask)
    for wanted, a, b in zip(mask, some, full, strict=True):
        torch.testing.assert_close(a, b if wanted else b.new_empty(0), rtol=0, atol=0)


@pytest.mark.parametrize("width", [1, 8, 9])
def test_more_rows_than_run_at_once(width: int, device: str) -> None:
    make = Make(torch.float32, device)
    x = make(2200, width)
    check(norm.layer_norm, x, make(width), make(width), 1e-5)
    check(linear.linear_act_backward, make(2200, width), make(2200, 2), make(width, 2), x, "gelu", [], [True] * 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_block_takes_several_rows(dtype: torch.dtype, device: str) -> None:
    """One after the other: a row of several warps, and one beyond the first chunk."""
    make = Make(dtype, device)
    with torch.no_grad():
        for rows, width in ((300, 600), (140, 8200)):
            check(norm.layer_norm, make(rows, width), make(width), make(width), 1e-5)
            check(norm.rms_norm, make(rows, width), make(width), 1e-6)
    for rows, width in ((20, 600), (9, 8200), (9, 16_400)):
        layer, rms = backward_args(make, rows, width)
        check(norm.layer_norm_backward, *layer)
        check(norm.rms_norm_backward, *rms)


def test_one_outlier_in_the_first_chunk_keeps_the_variance(device: str) -> None:
    x = torch.randn(2, 20_000, device=device)
    x[:, 0] = 1e4
    with torch.no_grad():
        check(norm.layer_norm, x, None, None, 1e-5)


@pytest.mark.parametrize(("dtype", "rows", "width"), edges("activation_backward"))
def test_activation_backward_edges(dtype: torch.dtype, rows: int, width: int, device: str) -> None:
    make = Make(dtype, device)
    dy, x, gate, up = make(rows, width), make(rows, 1), make(rows, width), make(rows, width)
    weights = [make(width, 1), make(width, 1)]
    for masked in (False, True):
        check(linear.linear_act_backward, dy, x, weights[0], gate, "silu", [], [True, True, masked])
        check(linear.gated_linear_backward, dy, x, *weights, gate, up, "tanh", [], [True, True, True, masked, False])
    check(linear.gated_linear_backward, dy, x, *weights, gate, up, "mish", [], [False, False, False, False, True])


def depths() -> Iterator[Any]:
    """(dtype, rows, depth): about one and two blocks' share of K, for 16-byte and for single accesses."""
    for row in table("skinny_linear"):
        if row["weights"] == 1:
            dtype = next(d for d in DTYPES if d.itemsize == row["element_bytes"])
            vec = row["access_bytes"] // row["element_bytes"]
            share = row["depth"]
            for depth in (share, share + vec, 2 * share + vec) if vec > 1 else (share - 1, share + 1, 2 * share + 1):
                yield pytest.param(dtype, row["rows"], depth, id=f"{dtype}-{row['rows']}x{depth}")


@pytest.mark.parametrize(("dtype", "rows", "depth"), depths())
def test_linear_split_over_its_depth(dtype: torch.dtype, rows: int, depth: int, device: str) -> None:
    make = Make(dtype, device)
    with torch.no_grad():
        check(linear.linear_act, make(rows, depth), make(5, depth), make(5), "gelu", [], True)


@pytest.mark.parametrize("rows", range(1, 17))
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
def test_linear_of_every_number_of_rows(dtype: torch.dtype, rows: int, device: str) -> None:
    make = Make(dtype, device)
    for width, depth in ((33, 40), (7, 41)):  # the widest block and one output more; 16-byte and single accesses
        x, weights, biases = make(rows, depth), [make(width, depth), make(width, depth)], vectors(make, width, 2)
        with torch.no_grad():
            check(linear.linear_act, x, weights[0], biases[0], "elu", [0.7], True)
            check(linear.gated_linear, x, *weights, *biases, "silu", [], True)


def test_float32_products_are_not_rounded(device: str) -> None:
    x, weight = torch.randn(4, 256, device=device), torch.randn(64, 256, device=device)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with dlops.use_backend("cuda"):
            y, _ = linear.linear_act(x, weight, None, "none", [], False)
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(y.double(), x.double() @ weight.double().t(), rtol=1e-5, atol=1e-5)


def test_linear_refuses_many_rows(device: str) -> None:
    x, weight = torch.randn(17, 8, device=device), torch.randn(3, 8, device=device)
    with dlops.use_backend("cuda"), pytest.raises(RuntimeError, match="at most 16 rows .*, got 17"):
        linear.linear_act(x, weight, None, "relu", [], False)
    with pytest.raises(RuntimeError, match=r"x: expected at most 16 rows, got a float32 .* of shape \(17, 8\)"):
        backend.cuda_library().linear_act(x, weight, None, "relu", [], False)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda ops, x, w: ops.linear_act(x, w[:, :3], None, "relu", [], False), r"weight: .*shape \(5, 4\), got"),
        (lambda ops, x, w: ops.linear_act(x, w[0], None, "relu", [], False), "weight: expected 2 dimensions"),
        (lambda ops, x, w: ops.linear_act(x, w, w[0], "relu", [], False), r"bias: expected shape \(5,\)"),
        (lambda ops, x, w: ops.linear_act(x, w, None, "swish", [], False), "activation: expected one of none, step"),
        (lambda ops, x, w: ops.linear_act(x, w, None, "elu", [], False), "params: expected 1 values for elu, got 0"),
        (lambda ops, x, w: ops.linear_act(x.double(), w, None, "elu", [1.0], False), "x: expected float32, bfloat16"),
        (
            lambda ops, x, w: ops.gated_linear(x, w, w[:4], None, None, "silu", [], False),
            r"weight_up: expected shape \(5, 4\)",
        ),
        (lambda ops, x, w: ops.act_backward(x, w, "relu", [], True), "dy: expected shape"),
        (lambda ops, x, w: ops.layer_norm(x, w[0, :3], None, 1e-5), r"weight: expected shape \(4,\)"),
        (lambda ops, x, w: ops.rms_norm_backward(x, x, None, x, None, [True, True]), "rstd: expected float32"),
    ],
)
def test_operators_check_their_arguments(call: Any, message: str, device: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call(backend.cuda_library(), torch.randn(2, 4, device=device), torch.randn(5, 4, device=device))


def strided(x: Tensor) -> Tensor:
    """x with rows 2^30 elements apart, past what 32 bits can address; memory that nothing touches costs nothing."""
    return torch.empty_strided(x.shape, (2**30, 1), dtype=x.dtype, device=x.device).copy_(x)


def test_rows_beyond_two_to_the_31st_element(device: str) -> None:
    make = Make(torch.bfloat16, device)
    x, dy, weight, gain = make(4, 8), make(4, 8), make(4, 8), make(8)
    _, mean, rstd = norm.layer_norm.definition(x, gain, None, 1e-5)
    calls: list[tuple[Op, list[Any]]] = [
        (norm.add_rms_norm, [x, dy, gain, 1e-6]),
        (norm.layer_norm_backward, [dy, x, gain, mean, rstd, x, [True, True, True]]),
        (linear.linear_act, [x, weight, None, "gelu", [], True]),
        (linear.linear_act_backward, [dy, x, weight.new_ones(8, 8), x, "gelu", [], [False, False, True]]),
    ]
    for op, near in calls:
        far = [strided(a) if isinstance(a, Tensor) and a.dim() == 2 else a for a in near]
        with dlops.use_backend("cuda"):
            torch.testing.assert_close(op(*far), op(*near), rtol=0, atol=0)


@pytest.mark.skipif(not EMULATED, reason="a GPU's order and memory are its own")
def test_neither_order_nor_poison_matters(device: str) -> None:
    simt = importlib.import_module("dlops._simt")
    make = Make(torch.bfloat16)
    layer, rms = backward_args(make, 70, 200)
    wide, _ = backward_args(make, 3, 12_000)
    x, weights = make(3, 3000), [make(5, 3000), make(5, 3000)]
    grads = [make(70, 200), make(70, 4), make(200, 4), make(200, 4), make(70, 200), make(70, 200)]
    calls: list[tuple[Op, list[Any]]] = [
        (norm.layer_norm, [layer[1], layer[2], None, 1e-5]),
        (norm.add_layer_norm, [*wide[:3], None, 1e-5]),
        (norm.layer_norm_backward, layer),
        (norm.rms_norm_backward, rms),
        (norm.layer_norm_backward, wide),
        (linear.gated_linear, [x, *weights, None, None, "silu", [], True]),
        (linear.gated_linear_backward, [*grads, "gelu", [], [True] * 5]),
    ]

    def results() -> list[Any]:
        with dlops.use_backend("cuda"):
            return [op(*args) for op, args in calls]

    expected = results()
    for seed, poison in ((1, 0), (2, 255), (3, 127)):
        before = simt.configure(seed=seed, poison=poison)
        try:
            found = results()
        finally:
            simt.configure(**before)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("bounds", [[0, 3], [0, 3, 5], [0, 5, 3], [2, 8], [3, 5, 8], [0, 900], [-7, 8]])
def test_scan_stays_within_bounds_that_do_not_fit(bounds: list[int], device: str) -> None:
    """They cannot be checked on a GPU without waiting for it: what lies behind them is taken for no bound."""
    make = Make(torch.float32, device, "normal")
    u, B, sequences = make(1, 3, 8), make(1, 1, 2, 8), len(bounds) - 1
    A, state = -make(3, 2).abs(), make(sequences, 3, 2)
    memory = torch.tensor([5, *bounds, 6, 7], dtype=torch.int32, device=device)
    others = torch.tensor([0, *bounds, 8, 2], dtype=torch.int32, device=device)
    found = []
    for cu_seqlens in (memory[1:-2], others[1:-2]):
        inputs = u, u.abs(), A, B, B, None, None, None, state, cu_seqlens
        with dlops.use_backend("cuda"):
            y, _, saved = scan.selective_scan(*inputs, False, True)
            gradients = scan.selective_scan_backward(y, *inputs, state, saved, False, [True] * 9)
        found.append((y, *gradients[:5]))
    for one, other in zip(*found, strict=True):
        assert one.isfinite().all() and torch.equal(one, other)


def test_scan_of_a_block_in_turns(device: str) -> None:
    """A block of more channels than its threads serve at a time sums dB and dC over all of them."""
    make = Make(torch.float32, device, "normal")
    u, B, C = make(1, 24, 5), make(1, 1, 65, 5), make(1, 1, 65, 5)
    check(scan.selective_scan, u, u.abs(), -make(24, 65).abs(), B, C, None, None, None, None, None, False, True)


def test_scan_without_channels(device: str) -> None:
    u, A, B = (torch.zeros(size, device=device, requires_grad=True) for size in ((1, 0, 4), (0, 3), (1, 3, 4)))
    with dlops.use_backend("cuda"):
        dlops.functional.selective_scan(u, u, A, B, B).sum().backward()
    assert B.grad is not None and torch.equal(B.grad, torch.zeros(1, 3, 4, device=device))
