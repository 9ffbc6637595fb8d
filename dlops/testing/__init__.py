"""The contract that every op is held to, and the one table of tolerances.

``check(op, *args)`` runs the contract on one set of arguments. The test suite runs it on every op's samples.
"""

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dlops import backend
from dlops._op import Op
from dlops.testing.guard import UNWRITTEN, poison

# max|y - y64| <= RATIO (max|yd - y64| + eps(dtype) max|y64|), and the same for the root mean square: y a backend's
# result, yd the definition's in the same dtype, y64 the definition's in float64.
RATIO = 2.0
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# How the values of a sample are drawn: standard normal; large mean; large and tiny for the dtype.
KINDS = ("normal", "mean100", "huge", "tiny")

Sampler = Callable[["Make"], Iterator[tuple[Any, ...]]]
_samplers: dict[str, tuple[Sampler, float]] = {}


def samples(op: Op, degree: int = 2) -> Callable[[Sampler], Sampler]:
    """Register the sample arguments of ``op``: a generator of argument tuples, given a :class:`Make`.

    Args:
        degree: the highest power of its inputs that the op or its backward computes. The kinds ``huge`` and ``tiny``
            draw magnitudes whose power of this degree stays within the dtype's range.
    """

    def register(sampler: Sampler) -> Sampler:
        _samplers[op.name] = (sampler, 0.8 / degree)
        return sampler

    return register


@dataclass
class Make:
    """Makes a sample's tensors: ``make(4, 8)`` is a random (4, 8) tensor of the dtype, device and kind under test."""

    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    kind: str = "normal"
    seed: int = 0
    exponent: float = 0.4

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)

    def __call__(self, *shape: int) -> Tensor:
        x = torch.randn(shape, generator=self._generator, dtype=torch.float64)
        info = torch.finfo(self.dtype)
        if self.kind == "mean100":
            x = x + 100
        elif self.kind == "huge":
            x = x * info.max**self.exponent
        elif self.kind == "tiny":
            x = x * info.tiny**self.exponent
        return x.to(self.device, self.dtype)

    def samples(self, op: Op) -> list[tuple[Any, ...]]:
        """All samples of ``op``.

        Raises:
            LookupError: the op has none, which the contract does not allow.
        """
        if op.name not in _samplers:
            raise LookupError(f"{op!r} has no samples: write a generator and decorate it with @samples({op.name})")
        sampler, self.exponent = _samplers[op.name]
        return list(sampler(self))


# ---- the error ratio -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ratio:
    """One output's or gradient's error over the definition's own error plus one eps; at most ``RATIO``."""

    op: str
    what: str
    dtype: torch.dtype
    backend: str
    largest: float
    rms: float


def error_ratio(y: Tensor, yd: Tensor, y64: Tensor) -> tuple[float, float]:
    """``(largest, rms)``: y's error against y64 over yd's, plus one eps of the largest (rms) value.

    Values at or beyond the end of the dtype's range, where rounding decides between finite and infinite, do not count.
    """
    assert y.dtype == yd.dtype, f"dtype {y.dtype}, the definition's is {yd.dtype}"
    assert y.shape == yd.shape == y64.shape, f"shape {tuple(y.shape)}, the definition's is {tuple(yd.shape)}"
    if y.is_complex():
        y, yd, y64 = (torch.view_as_real(t.resolve_conj()) for t in (y, yd, y64))
    info = torch.finfo(y.dtype)
    assert not y[y64.isinf()].isfinite().any(), "finite where the float64 result is infinite"
    counted = yd.isfinite() & (y64.abs() <= info.max) & (y.isfinite() | (y64.abs() < info.max * (1 - 16 * info.eps)))
    y, yd, y64 = y[counted].double(), yd[counted].double(), y64[counted].double()
    assert not (bad := y.isnan().sum()), f"{bad} of {y.numel()} elements are NaN, the definition's are not"
    if y64.numel() == 0:
        return 0.0, 0.0
    return _over(y, yd, y64, torch.amax, info.eps), _over(y, yd, y64, _root_mean_square, info.eps)


def _over(y: Tensor, yd: Tensor, y64: Tensor, norm: Callable[[Tensor], Tensor], eps: float) -> float:
    error, own, size = norm((y - y64).abs()), norm((yd - y64).abs()), norm(y64.abs())
    return 0.0 if error == 0 else float(error / (own + eps * size))


def _root_mean_square(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def check_draws(draws: Iterable[Iterable[tuple[Tensor, Tensor, Tensor]]]) -> None:
    """Assert the error ratio of what many ops make together, such as a model's output and gradients.

    Args:
        draws: for each draw of the input ``(y, yd, y64)`` of every result, as :func:`error_ratio` takes them. Those of
            all draws count together: such a chain amplifies now and then what one op has rounded.
    """
    for number, of_draws in enumerate(zip(*draws, strict=True)):
        largest, rms = error_ratio(*(torch.stack(t).detach() for t in zip(*of_draws, strict=True)))
        assert largest <= RATIO and rms <= RATIO, f"result {number}: largest {largest}, rms {rms}"


def ratios(op: Op, draws: Sequence[Sequence[Any]], name: str) -> list[Ratio]:
    """The error ratios of every floating-point output, and of every gradient, of ``op`` on backend ``name``.

    Args:
        draws: one or more argument lists of the same shapes; few small outputs say little about their largest error,
            so those of all draws count together.
    """
    dtype = next(a.dtype for a in draws[0] if isinstance(a, Tensor))
    values: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for args in draws:
        for what, *found in [*_values(op, args, name), *(_gradients(op, args, name) if op.differentiable else ())]:
            values.setdefault(what, []).append(tuple(t.flatten() for t in found))  # type: ignore[arg-type]
    return [
        Ratio(op.name, what, dtype, name, *error_ratio(*(torch.cat(t) for t in zip(*found, strict=True))))
        for what, found in values.items()
    ]


def evaluate(op: Op, args: Sequence[Any], function: Callable[..., Any] | None = None) -> tuple[Tensor, ...]:
    """What ``function`` (the op if None) returns and, after it, the arguments that it writes to: those are copied
    first, and ``args`` stay as they are."""
    given = fresh(op, args)
    written = [a for what, a in zip(op.argument_names, given, strict=True) if what in op.mutates]
    return (*as_tuple((function or op)(*given)), *written)


def fresh(op: Op, args: Sequence[Any]) -> list[Any]:
    """``args`` with a copy of each that ``op`` writes to, in the same layout."""

    def copied(a: Tensor) -> Tensor:
        storage = torch.UntypedStorage(a.untyped_storage().nbytes(), device=a.device)
        return a.new_empty(0).set_(storage, a.storage_offset(), a.shape, a.stride()).copy_(a)

    return [copied(a) if what in op.mutates else a for what, a in zip(op.argument_names, args, strict=True)]


def _values(op: Op, args: Sequence[Any], name: str) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    with backend.use_backend(name), torch.no_grad(), poison():
        ours = evaluate(op, args)
    theirs, exact = evaluate(op, args, op.definition), evaluate(op, _double(args), op.definition)
    for what, y, yd, y64 in zip(op.returns + op.mutates, ours, theirs, exact, strict=True):
        assert y.shape == yd.shape and y.dtype == yd.dtype and y.stride() == yd.stride(), (
            f"{op.name} on {name}: {what} is {y.dtype}{tuple(y.shape)}, strides {y.stride()}; "
            f"the definition's is {yd.dtype}{tuple(yd.shape)}, strides {yd.stride()}"
        )
        if _floating(y):
            yield what, y, yd, y64
        else:
            left = ((y == UNWRITTEN) & (yd != UNWRITTEN)).sum()
            assert not left, f"{op.name} on {name}: {left} of {y.numel()} elements of {what} were not written"


def _gradients(op: Op, args: Sequence[Any], name: str) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    dys = _output_gradients(op, as_tuple(op.definition(*args)))
    with backend.use_backend(name), poison():
        ours = gradients(op, args, dys)
    with backend.use_backend("torch"):  # the definition of the backward
        theirs = gradients(op, args, dys)
    exact = gradients(op.definition, _double(args), _double(dys))
    yield from zip([f"d{n}" for n in _float_names(op, args)], ours, theirs, exact, strict=True)


def _output_gradients(op: Op, outputs: Sequence[Tensor]) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(7)
    return [
        None
        if i in op.non_differentiable
        else torch.randn(o.shape, generator=generator, dtype=_exact(o)).to(o.device, o.dtype)
        for i, o in enumerate(outputs)
    ]


def _double(args: Sequence[Any]) -> list[Any]:
    return [a.to(_exact(a)) if _floating(a) else a for a in args]


def _exact(a: Tensor) -> torch.dtype:
    return torch.complex128 if a.is_complex() else torch.float64


def gradients(function: Callable[..., Any], args: Sequence[Any], dys: Sequence[Tensor | None]) -> list[Tensor]:
    """Gradients of ``function`` for every floating-point argument, given one gradient (or None) per output."""
    leaves = [a.detach().requires_grad_() if _floating(a) else a for a in args]
    outputs = as_tuple(function(*leaves))
    pairs = [(o, dy) for o, dy in zip(outputs, dys, strict=True) if dy is not None and o.requires_grad]
    wanted = [a for a in leaves if _floating(a)]
    found = torch.autograd.grad([o for o, _ in pairs], wanted, [dy for _, dy in pairs], allow_unused=True)
    return [torch.zeros_like(a) if g is None else g for a, g in zip(wanted, found, strict=True)]


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _float_names(op: Op, args: Sequence[Any]) -> list[str]:
    return [name for name, a in zip(op.argument_names, args, strict=True) if _floating(a)]


def numerics_page(found: Sequence[Ratio]) -> str:
    """docs/numerics.md: the largest error ratio of every op, output, dtype and backend in a run."""
    worst: dict[tuple[str, str, str, torch.dtype], float] = {}
    for r in found:
        key = (r.op, r.what, r.backend, r.dtype)
        worst[key] = max(worst.get(key, 0.0), r.largest, r.rms)
    dtypes = [*DTYPES, *sorted({r.dtype for r in found} - set(DTYPES), key=str)]
    lines = [
        "# Numerics",
        "",
        "Generated by `make docs` from a run of the test suite. Each number is the largest, over all samples, of",
        "",
        "    max|y - y64| / (max|yd - y64| + eps max|y64|)",
        "",
        "and of the same with the root mean square: y a backend's result, yd the definition's (plain PyTorch) in the",
        "same dtype, y64 the definition's on float64 inputs, eps the dtype's. 1 is as accurate as PyTorch; the",
        f"contract allows {RATIO:g}. Inputs: standard normal, mean 100, large and tiny magnitudes, rows up to 8,200.",
        f"torch {torch.__version__}; the backend triton ran in "
        f"{'Triton' + chr(39) + 's interpreter' if backend.triton_interpreted() else 'its compiler'}, cuda on "
        f"{'the host (docs/simt.md)' if backend.cuda_emulated() else 'a GPU'}.",
        "",
        "| op | output | backend | " + " | ".join(str(d).removeprefix("torch.") for d in dtypes) + " |",
        "|---|---|---|" + "---|" * len(dtypes),
    ]
    for op, what, name in sorted({key[:3] for key in worst}):
        cells = [worst.get((op, what, name, dtype)) for dtype in dtypes]
        lines.append(f"| {op} | {what} | {name} | " + " | ".join("" if c is None else f"{c:.2f}" for c in cells) + " |")
    return "\n".join(lines) + "\n"


# ---- the other properties ------------------------------------------------------------------------------------------


def runs(op: Op, name: str, args: Sequence[Any]) -> bool:
    """Whether backend ``name`` serves these arguments in this process."""
    return backend.refusal(op, name, args) is None


def check_ratios(op: Op, draws: Sequence[Sequence[Any]], name: str) -> list[Ratio]:
    """Assert the error ratio of every output and gradient, and return them; ``draws`` as in :func:`ratios`."""
    found = ratios(op, draws, name)
    for r in found:
        assert r.largest <= RATIO and r.rms <= RATIO, f"{r} on {describe(draws[0])}"
    return found


def check_deterministic(op: Op, args: Sequence[Any], name: str) -> None:
    """Values and gradients are bit-identical when the call is repeated."""
    with backend.use_backend(name):
        first, second = evaluate(op, args), evaluate(op, args)
        results = [first, second]
        if op.differentiable:
            dys = [None if i in op.non_differentiable else torch.ones_like(o) for i, o in enumerate(first)]
            results = [first + tuple(gradients(op, args, dys)), second + tuple(gradients(op, args, dys))]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def layouts(args: Sequence[Any]) -> Iterator[list[Any]]:
    """``args`` with the same values in other layouts: every tensor sliced out of a larger one, transposed in memory,
    misaligned by one element."""

    def sliced(a: Tensor) -> Tensor:
        big = a.new_full([2 * size + 1 for size in a.shape[:-1]] + [a.shape[-1] + 3], 7)
        view = big[(*[slice(1, None, 2)] * (a.dim() - 1), slice(2, 2 + a.shape[-1]))]
        return view[tuple(slice(0, size) for size in a.shape)].copy_(a)

    def transposed(a: Tensor) -> Tensor:
        return a.mT.contiguous().mT if a.dim() > 1 else a.repeat_interleave(2)[::2]

    def misaligned(a: Tensor) -> Tensor:
        return a.new_empty(a.numel() + 1)[1:].view(a.shape).copy_(a)

    for change in (sliced, transposed, misaligned):
        yield [change(a) if _floating(a) and a.dim() else a for a in args]


def check_layouts(op: Op, args: Sequence[Any], name: str) -> None:
    """Every memory layout of the arguments gives the results of the one they have."""
    _check_same(op, args, (changed for changed in layouts(args) if runs(op, name, changed)), name)


def _check_same(op: Op, args: Sequence[Any], others: Iterable[Sequence[Any]], name: str) -> None:
    """Each of ``others`` has ``args``' values, and gives their results exactly or, where its layout makes a kernel add
    up in another order, keeps the error ratio; its outputs have the strides of the definition's. Whether ``args``'
    own results are right is for :func:`check_ratios`."""
    expected = _results(op, args, name)
    for changed in others:
        found = _results(op, changed, name)
        outputs = evaluate(op, changed, op.definition)
        for what, y, yd in zip(op.returns + op.mutates, found[: len(outputs)], outputs, strict=True):
            assert y.stride() == yd.stride(), f"{op.name} on {name}: {what} has strides {y.stride()}, not {yd.stride()}"
        for y, e in zip(found, expected, strict=True):
            assert y.shape == e.shape and y.dtype == e.dtype, (
                f"{op.name} on {name}: {y.dtype}{tuple(y.shape)} in another layout, not {e.dtype}{tuple(e.shape)}"
            )
        if not all(((y == e) | (y.isnan() & e.isnan())).all() for y, e in zip(found, expected, strict=True)):
            check_ratios(op, [changed], name)


def _results(op: Op, args: Sequence[Any], name: str) -> tuple[Tensor, ...]:
    """What ``op`` returns and writes to and, if it is differentiable, all gradients."""
    with backend.use_backend(name), poison():
        outputs = evaluate(op, args)
        dys = _output_gradients(op, outputs[: len(op.returns)])
        return outputs + tuple(gradients(op, args, dys)) if op.differentiable else outputs


def distant(a: Tensor) -> Tensor:
    """``a`` with its outermost elements so far apart that the last is more than 2^31 elements from the first. Only the
    pages that hold its values are ever committed."""
    stride = 2**31 // (a.shape[0] - 1) // 8 * 8 + 8  # rows stay on 16-byte boundaries
    return torch.empty_strided(a.shape, (stride, *a[0].contiguous().stride()), dtype=a.dtype, device=a.device).copy_(a)


def check_distant(op: Op, args: Sequence[Any], name: str) -> None:
    """Offsets that do not fit 32 bits, in one argument after the other, give the same results."""
    others = (
        [*args[:i], distant(a), *args[i + 1 :]]
        for i, a in enumerate(args)
        if isinstance(a, Tensor) and a.dim() and a.shape[0] > 1
    )
    _check_same(op, args, others, name)


def check_untouched(op: Op, args: Sequence[Any], name: str) -> None:
    """No argument is written to that the op does not say it writes to, and no output shares memory with one. Outputs
    may be written to, as autograd would not allow if one were a view."""
    args = fresh(op, args)
    before = copy.deepcopy(args)
    with backend.use_backend(name):
        outputs = as_tuple(op(*args))
        if op.differentiable:
            leaves = [a.detach().requires_grad_() if _floating(a) else a for a in args]
            for call in (op, getattr(torch.ops.dlops, op.name)):
                assert not any(o._is_view() for o in as_tuple(call(*leaves))), "output is a view"
    for what, a, b in zip(op.argument_names, args, before, strict=True):
        if isinstance(a, Tensor):
            if what not in op.mutates:
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
            for o in outputs:
                if o.numel() and a.numel():
                    assert o.untyped_storage().data_ptr() != a.untyped_storage().data_ptr(), "output is a view"


def check_output_mask(op: Op, args: Sequence[Any], name: str) -> None:
    """Only the gradients that are asked for come back, each equal to the one of the full backward. Of many, the
    interpreter, which is slow, is asked for each alone and for all but each."""
    names = [i for i, a in enumerate(args) if _floating(a)]
    masks = [asked for asked in itertools.product((False, True), repeat=len(names)) if any(asked)]
    if name == "triton" and backend.triton_interpreted() and len(names) > 6:
        masks = [asked for asked in masks if sum(asked) in (1, len(names) - 1)]

    def backward(leaves: Sequence[Any]) -> None:
        outputs = [o for o in as_tuple(op(*leaves)) if o.requires_grad]
        torch.autograd.backward(outputs, [torch.ones_like(o) for o in outputs])

    with backend.use_backend(name):
        full = [a.detach().requires_grad_() if _floating(a) else a for a in args]
        backward(full)
        for asked in masks:
            wanted = {i for i, yes in zip(names, asked, strict=True) if yes}
            leaves = [a.detach().requires_grad_(i in wanted) if _floating(a) else a for i, a in enumerate(args)]
            backward(leaves)
            for i in names:
                if i in wanted:
                    torch.testing.assert_close(leaves[i].grad, full[i].grad, rtol=0, atol=0, equal_nan=True)
                else:
                    assert leaves[i].grad is None


def check_gradgrad(op: Op, args: Sequence[Any]) -> None:
    """gradcheck and gradgradcheck on float64 arguments."""
    wanted = [i for i, a in enumerate(args) if _floating(a)]
    leaves = [a.detach().requires_grad_() for a in _double([args[i] for i in wanted])]
    fixed = op.non_differentiable

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        full = list(args)
        for i, t in zip(wanted, tensors, strict=True):
            full[i] = t
        return tuple(o for i, o in enumerate(as_tuple(op(*full))) if i not in fixed)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def check_transforms(op: Op, args: Sequence[Any]) -> None:
    """torch.func's grad, vmap(grad), jacrev and jvp with respect to real arguments equal the definition's."""
    wanted = [i for i, a in enumerate(args) if _floating(a) and not a.is_complex()]
    tensors = tuple(args[i].detach() for i in wanted)

    def of(function: Callable[..., Any]) -> Callable[..., Tensor]:
        def scalar(*given: Tensor) -> Tensor:
            full = list(args)
            for i, t in zip(wanted, given, strict=True):
                full[i] = t
            return as_tuple(function(*full))[0].sin().sum()

        return scalar

    where = tuple(range(len(tensors)))
    for transform in (
        lambda f: torch.func.grad(f, where)(*tensors),
        lambda f: torch.func.jacrev(f, where)(*tensors),
        lambda f: torch.func.jvp(f, tensors, tensors),
        lambda f: torch.func.vmap(torch.func.grad(f, where))(*[torch.stack([t, 2 * t]) for t in tensors]),
    ):
        torch.testing.assert_close(transform(of(op)), transform(of(op.definition)), rtol=0, atol=0)


def check_compiled(op: Op, args: Sequence[Any], name: str) -> None:
    """opcheck, ``torch.compile(fullgraph=True)``, ``torch.export`` and activation checkpointing, on one backend."""
    with backend.use_backend(name):
        torch.library.opcheck(getattr(torch.ops.dlops, op.name).default, _leaves(args, op.differentiable))
        eager = evaluate(op, args)
        torch._dynamo.reset()
        compiled = evaluate(op, args, torch.compile(op, fullgraph=True, backend="aot_eager"))
        program = torch.export.export(_Module(op, args), _tensors(fresh(op, args))).module()
        exported = evaluate(op, args, lambda *given: program(*_tensors(given)))
        for other in (compiled, exported):
            torch.testing.assert_close(other, eager, rtol=0, atol=0, equal_nan=True)
        if op.differentiable:
            leaves = _leaves(args, True)
            once = [o for o in as_tuple(op(*leaves)) if o.requires_grad]
            again = [o for o in as_tuple(checkpoint(op, *leaves, use_reentrant=False)) if o.requires_grad]
            wanted = [a for a in leaves if _floating(a)]
            ones = [torch.ones_like(o) for o in once]
            expected, found = (torch.autograd.grad(some, wanted, ones) for some in (once, again))
            torch.testing.assert_close(found, expected)


class _Module(torch.nn.Module):
    def __init__(self, op: Op, args: Sequence[Any]) -> None:
        super().__init__()
        self.op, self.args = op, args

    def forward(self, *tensors: Tensor) -> Any:
        given = iter(tensors)
        return self.op(*[next(given) if isinstance(a, Tensor) else a for a in self.args])


def _tensors(args: Sequence[Any]) -> tuple[Tensor, ...]:
    return tuple(a for a in args if isinstance(a, Tensor))


def _leaves(args: Sequence[Any], requires_grad: bool) -> tuple[Any, ...]:
    return tuple(a.detach().requires_grad_(requires_grad) if _floating(a) else a for a in args)


def describe(args: Sequence[Any]) -> str:
    """``args`` for a message: tensors by dtype, shape and strides."""
    return ", ".join(f"{a.dtype}{tuple(a.shape)}@{a.stride()}" if isinstance(a, Tensor) else repr(a) for a in args)


def check(op: Op, *args: Any) -> list[Ratio]:
    """Hold ``op`` to the contract on ``args``, on every backend available to them.

    Raises:
        AssertionError: a property does not hold; the message names it.
    """
    found = []
    for name in op.implementations:
        if runs(op, name, args):
            found += check_ratios(op, [args], name)
            check_deterministic(op, args, name)
            check_untouched(op, args, name)
            check_compiled(op, args, name)
    return found
