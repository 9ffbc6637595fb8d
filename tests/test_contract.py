"""The contract, for every op, on every backend.

An op added later is found in the registry, and its samples in tests/test_*.py.
"""

import dataclasses
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing

import dlops
from dlops import backend, testing
from dlops._op import Op, registry
from dlops.testing import DTYPES, KINDS, Make

for path in sorted(Path(__file__).parent.glob("test_*.py")):
    if path.name != Path(__file__).name and "@samples(" in path.read_text() and path.stem not in sys.modules:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[path.stem])

OPS = list(registry.values())
for _op in OPS:
    Make().samples(_op)  # an op without samples fails collection

PAIRS = [pytest.param(op, name, id=f"{op.name}-{name}") for op in OPS for name in op.implementations]
KERNELS = [pair for pair in PAIRS if pair.values[1] != "torch"]
DIFFERENTIABLE = [op for op in OPS if op.differentiable]
# What a kernel may refuse, by the words of the reason; vendor's may refuse anything. All else in the samples it must
# serve, in every dtype of DTYPES.
MAY_REFUSE = {
    (op, name): "a real A" for op in ("selective_scan", "selective_scan_backward") for name in ("cuda", "triton")
}


def served(op: Op, name: str, make: Make) -> list[tuple[Any, ...]]:
    """The samples that ``name`` serves; skips where the backend is not available, fails where a kernel refuses one."""
    if (reason := backend.missing(name)) is not None:
        pytest.skip(reason)
    if name == "cpu" or (name == "cuda" and backend.cuda_emulated()):
        make = dataclasses.replace(make, device="cpu")  # whatever device the others are tested on
    found = []
    for args in make.samples(op):
        reason = backend.refusal(op, name, args)
        may = name == "vendor" or MAY_REFUSE.get((op.name, name), "nothing at all") in (reason or "")
        assert reason is None or may, f"{op.name} on {name} refuses {testing.describe(args)}: {reason}"
        if reason is None:
            found.append(args)
    return found


def interpreted(name: str, device: str) -> bool:
    """Whether a backend runs in Triton's interpreter, which is slow."""
    return name == "triton" and device == "cpu"


def scarce(args: tuple[Any, ...]) -> bool:
    """Whether the gradient of an argument has so few values that one draw of them says nothing about its error."""
    return any(0 < a.numel() < 4 for a in args if isinstance(a, torch.Tensor) and a.is_floating_point())


# Kernels for a GPU on the CPU take all samples in float32-normal, and a share in every other combination.
UNUSUAL = [(dtype, kind) for dtype in DTYPES for kind in KINDS][1:]
SHARE = 4
LONG = 200_000  # elements, for which the interpreter takes minutes


def share(samples: list[Any], name: str, device: str, dtype: torch.dtype, kind: str = "normal") -> list[Any]:
    """The samples whose error ratio is tested."""
    if name in ("triton", "cuda") and device == "cpu" and (dtype, kind) in UNUSUAL:
        return samples[UNUSUAL.index((dtype, kind)) % SHARE :: SHARE]
    return samples


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "name"), KERNELS)
def test_error_ratio(op: Op, name: str, dtype: torch.dtype, kind: str, device: str, record_ratios: Any) -> None:
    # Few small outputs say little about their largest error: those of several draws count together.
    samples = list(zip(*[served(op, name, Make(dtype, device, kind, seed)) for seed in range(4)], strict=True))
    for draws in share(samples, name, device, dtype, kind):
        if interpreted(name, device) and draws[0][0].numel() > LONG:
            continue
        few = draws[0][0].numel() < 1000 and (scarce(draws[0]) or not interpreted(name, device))
        record_ratios(testing.check_ratios(op, draws if few else draws[:1], name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("op", "name"), PAIRS)
def test_layouts(op: Op, name: str, dtype: torch.dtype, device: str) -> None:
    samples = share(served(op, name, Make(dtype, device)), name, device, dtype)
    if dtype == torch.float32:
        samples = samples[:: SHARE if interpreted(name, device) else 2]
    for args in samples:
        if args[0].numel() < 10_000:
            testing.check_layouts(op, args, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("op", "name"), KERNELS)
def test_offsets_past_2_to_the_31(op: Op, name: str, dtype: torch.dtype, device: str) -> None:
    samples = share(served(op, name, Make(dtype, device)), name, device, dtype)
    found = [a for a in samples if a[0].dim() >= 2 and min(a[0].shape) > 1]
    if not found:
        pytest.skip(f"{name} serves none of the samples on {device}")
    testing.check_distant(op, found[0], name)


@pytest.mark.parametrize(("op", "name"), PAIRS)
def test_deterministic_and_functional(op: Op, name: str, device: str) -> None:
    for args in served(op, name, Make(torch.float32, device))[:: SHARE if interpreted(name, device) else 2]:
        testing.check_deterministic(op, args, name)
        testing.check_untouched(op, args, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", [op for op in OPS if "cuda" in op.implementations], ids=lambda op: op.name)
def test_emulated_kernels_depend_on_no_order_and_no_unwritten_shared_memory(op: Op, dtype: torch.dtype) -> None:
    if not backend.cuda_emulated():
        pytest.skip("dlops._simt is not built, or there is a GPU")
    simt = importlib.import_module("dlops._simt")
    before = simt.configure()
    try:
        for args in served(op, "cuda", Make(dtype)):
            results = []
            for seed, poison in ((1, 0xFF), (2, 0x3C)):
                simt.configure(seed=seed, poison=poison)
                with dlops.use_backend("cuda"):
                    results.append(testing.evaluate(op, args))
            torch.testing.assert_close(results[0], results[1], rtol=0, atol=0, equal_nan=True)
    finally:
        simt.configure(**before)


@pytest.mark.parametrize(("op", "name"), PAIRS)
def test_output_mask(op: Op, name: str, device: str) -> None:
    if not op.differentiable:
        pytest.skip("not differentiable")
    for args in served(op, name, Make(torch.float32, device))[:1]:
        testing.check_output_mask(op, args, name)


@pytest.mark.parametrize(("op", "name"), PAIRS)
def test_compiled(op: Op, name: str, device: str) -> None:
    samples = [args for args in served(op, name, Make(torch.float32, device)) if args[0].numel() > 1]
    for args in samples[:1]:
        testing.check_compiled(op, args, name)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_one_dynamic_graph_serves_five_lengths(op: Op) -> None:
    args = next(args for args in Make(torch.float32).samples(op) if args[0].dim() >= 2 and args[0].numel() > 1)
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(op, backend=counter, dynamic=True, fullgraph=True)
    rows = args[0].shape[0]
    for length in (2, 3, 5, 8, 13):
        longer = [
            a[[i % rows for i in range(length)]] if isinstance(a, torch.Tensor) and leads(op, a, i, rows) else a
            for i, a in enumerate(args)
        ]
        found = testing.evaluate(op, longer, compiled)
        torch.testing.assert_close(found, testing.evaluate(op, longer), rtol=0, atol=0)
    assert counter.frame_count == 1


def leads(op: Op, tensor: torch.Tensor, i: int, rows: int) -> bool:
    """Whether an argument has the batch dimension: parameters do not."""
    return tensor.shape[0] == rows and not op.argument_names[i].startswith(("weight", "bias"))


@pytest.mark.parametrize("op", DIFFERENTIABLE, ids=lambda op: op.name)
def test_gradgrad(op: Op) -> None:
    for args in Make(torch.float64).samples(op):
        if 1 < args[0].numel() < 40:
            testing.check_gradgrad(op, args)


@pytest.mark.parametrize("op", DIFFERENTIABLE, ids=lambda op: op.name)
def test_transforms(op: Op) -> None:
    for args in Make(torch.float64).samples(op)[:3]:
        if args[0].numel() > 1:
            testing.check_transforms(op, args)


@pytest.mark.parametrize("op", DIFFERENTIABLE, ids=lambda op: op.name)
def test_batched_gradients(op: Op) -> None:
    """Such as a Jacobian's, of which torch.autograd computes all rows at once."""
    args = next(a for a in Make(torch.float64).samples(op) if a[0].numel() > 1)
    leaves = [a.detach().requires_grad_() if testing._floating(a) else a for a in args]
    output = testing.as_tuple(op(*leaves))[0]
    wanted = [a for a in leaves if testing._floating(a)]
    rows = torch.randn(3, *output.shape, dtype=output.dtype)

    def gradients(dy: torch.Tensor, batched: bool) -> Any:
        return torch.autograd.grad(output, wanted, dy, retain_graph=True, is_grads_batched=batched, allow_unused=True)

    for batched, *alone in zip(gradients(rows, True), *[gradients(dy, False) for dy in rows], strict=True):
        torch.testing.assert_close(batched, None if batched is None else torch.stack(alone))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", DIFFERENTIABLE, ids=lambda op: op.name)
def test_autocast_follows_torch(op: Op, dtype: torch.dtype, device: str) -> None:
    for args in Make(torch.float32, device).samples(op)[:4]:
        with torch.autocast(device, dtype):
            outputs = testing.as_tuple(op(*args))
            expected = testing.as_tuple(op.definition(*args))
        for ours, theirs in zip(outputs, expected, strict=True):
            assert ours.dtype == theirs.dtype or ours.numel() == 0
        torch._dynamo.reset()
        compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
        with torch.autocast(device, dtype):
            torch.testing.assert_close(testing.as_tuple(compiled(*args)), outputs, rtol=0, atol=0)


@pytest.mark.parametrize(("op", "name"), PAIRS)
def test_nan_stays_in_its_row(op: Op, name: str, device: str) -> None:
    found = [
        a
        for a in served(op, name, Make(torch.float32, device))
        if a[0].dim() >= 2 and a[0].shape[0] > 1 and a[0].numel() > 8
    ]
    if not found:
        pytest.skip(f"{name} serves none of the samples on {device}")
    args = found[0]
    for bad in (float("nan"), float("inf")):
        poisoned = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
        poisoned[0][0] = bad
        with dlops.use_backend(name):
            clean, dirty = testing.evaluate(op, args), testing.evaluate(op, poisoned)
        for what, a, b in zip(op.returns + op.mutates, clean, dirty, strict=True):
            if not what.startswith(("dweight", "dbias")) and a.numel() and a.shape[0] == args[0].shape[0]:
                torch.testing.assert_close(b[1:], a[1:], rtol=0, atol=0)


@pytest.mark.parametrize(("op", "name"), PAIRS)
def test_nan_is_not_hidden(op: Op, name: str, device: str) -> None:
    """Outputs and gradients are NaN wherever the definition's are, whichever branch of the op a sample takes."""
    for args in served(op, name, Make(torch.float32, device)):
        if args[0].dim() != 2 or not 8 < args[0].numel() < 5000:
            continue
        if any(isinstance(a, str) and a in ("step", "sign") for a in args):
            continue  # whether the product with a derivative of 0 is formed is left open
        poisoned = [args[0].clone(), *args[1:]]
        poisoned[0][0] = float("nan")
        with dlops.use_backend(name):
            ours = [*testing.evaluate(op, poisoned), *all_gradients(op, poisoned)]
        with dlops.use_backend("torch"):
            theirs = [*testing.evaluate(op, poisoned), *all_gradients(op, poisoned)]
        for a, b in zip(ours, theirs, strict=True):
            assert not (b.isnan() & ~a.isnan()).any()


def all_gradients(op: Op, args: Any) -> list[torch.Tensor]:
    if not op.differentiable:
        return []
    outputs = testing.as_tuple(op.definition(*args))
    dys = [None if i in op.non_differentiable else torch.ones_like(o) for i, o in enumerate(outputs)]
    return testing.gradients(op, args, dys)


@pytest.mark.parametrize("op", DIFFERENTIABLE, ids=lambda op: op.name)
def test_the_forced_backend_is_kept_for_backward(op: Op) -> None:
    args = [a.requires_grad_() if testing._floating(a) else a for a in Make(torch.float32).samples(op)[0]]
    with dlops.use_backend("torch"):
        outputs = [o for o in testing.as_tuple(op(*args)) if o.requires_grad]
    explanation = dlops.explain(lambda: torch.autograd.backward(outputs, [torch.ones_like(o) for o in outputs]))
    assert [d.backend for d in explanation.decisions] == ["torch"]


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_thread_count_does_not_change_bits(op: Op) -> None:
    if backend.missing("cpu") or "cpu" not in op.implementations:
        pytest.skip("dlops._C is not built, or has no kernel")
    threads = torch.get_num_threads()
    args = next(a for a in served(op, "cpu", Make(torch.float32)) if a[0].dim() >= 2 and a[0].numel() > 8)
    if op.family == "linear":
        pytest.skip("torch's own matrix products may split the sum over threads")
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            with dlops.use_backend("cpu"):
                results.append(testing.evaluate(op, args))
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
