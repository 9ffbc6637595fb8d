"""@op: one definition in plain PyTorch becomes a registered, differentiable, dispatched operator."""

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import _profiler_enabled, forward_ad  # pyright: ignore[reportPrivateImportUsage]

from dlops import backend

Outputs = tuple[Any, ...]
Formula = Callable[[Outputs, Sequence[Any], Sequence[Tensor], list[bool]], Sequence[Tensor | None]]

library = torch.library.Library("dlops", "DEF")
registry: dict[str, "Op"] = {}


def _keys(name: str) -> torch._C.DispatchKeySet:
    return torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name))


_AUTOCAST_KEYS = _keys("AutocastCPU") | _keys("AutocastCUDA")
_PLAIN_KEYS = frozenset(
    (_keys(device) | _keys("ADInplaceOrView") | _keys(f"Autograd{device}") | _keys(f"Autocast{device}")).raw_repr()
    for device in ("CPU", "CUDA")
)

ZERO = object()  # stands for a saved argument that is zero, shaped like the first: see Op.register_autograd


def acc(x: Tensor) -> Tensor:
    """``x`` in the dtype that reductions accumulate in: float32, or float64 for float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def sum_rows(x: Tensor) -> Tensor:
    """The sum of ``x`` over all but its last dimension."""
    return as_rows(x).sum(0)


def as_rows(x: Tensor) -> Tensor:
    """``x`` with its leading dimensions flattened into one: (..., D) as (M, D)."""
    return x.flatten(0, -2) if x.dim() > 1 else x[None]


class Op:
    """One mathematical function of tensors, registered as ``torch.ops.dlops.<name>``.

    Call it with positional arguments in the schema's order. ``definition`` is its meaning in plain PyTorch;
    :meth:`implement` adds faster ways to compute it, :attr:`rule` orders them by measured speed.
    """

    def __init__(
        self,
        definition: Callable[..., Any],
        *,
        check: Callable[..., None] | None,
        fake: Callable[..., Any] | None,
        autocast: Mapping[str, torch.dtype | None] | None,
        returns: Sequence[str],
    ) -> None:
        self.name: str = definition.__name__
        self.family: str = definition.__module__.rpartition(".")[2]
        self.definition = definition
        self.returns = tuple(returns)
        self.non_differentiable: frozenset[int] = frozenset()
        self._function: Any = None
        self.implementations: dict[str, backend.Implementation] = {}
        self.rule: Callable[..., Sequence[str]] = default_rule
        self.check = check or _accepts_anything
        self._autocast = autocast or {}
        self.__doc__ = definition.__doc__
        library.define(
            self.name + torch.library.infer_schema(definition, mutates_args=()), tags=(torch.Tag.pt2_compliant_tag,)
        )
        self._overload = getattr(torch.ops.dlops, self.name).default
        self.argument_names = [argument.name for argument in self._overload._schema.arguments]
        library.impl(self.name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"dlops::{self.name}", self._fake(fake or definition), lib=library)
        for device in ("CPU", "CUDA"):
            library.impl(self.name, self._autocast_kernel(device.lower()), f"Autocast{device}")
        self.implement("torch", lambda: definition)
        registry[self.name] = self

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._overload(*args)
        if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            self.check(*args)
            return self.definition(*args)
        if not _ordinary(args):
            return self._overload(*args)
        if torch._C.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return self._function.apply(*args) if self._function else self._overload(*args)
        return self._run(*args)

    def __repr__(self) -> str:
        return f"dlops op {self._overload._schema}"

    def implement(
        self,
        name: str,
        load: Callable[[], Callable[..., Any]] | None = None,
        refuses: Callable[..., str | None] | None = None,
    ) -> None:
        """Add the implementation ``name``. Without ``load`` it is found by the op's name: ``dlops_cpu::<op>``,
        ``dlops_cuda::<op>`` (``dlops_simt::<op>`` where CUDA is emulated), or ``dlops.kernels.<family>.<op>`` with the
        ``unsupported`` beside it.

        Args:
            name: a backend.
            load: returns the callable; called once, when the backend is first used.
            refuses: called with the op's arguments, returns why they cannot be served, or ``None``.
        """
        by_name = {"cpu": self._load_cpu, "cuda": self._load_cuda, "triton": self._load_triton}
        devices = {"cpu": _refuses_cpu, "cuda": _refuses_cuda, "triton": self._refuses_triton}
        general = devices.get(name, _refuses_nothing)

        def combined(*args: Any) -> str | None:
            return general(*args) or (refuses(*args) if refuses is not None else None)

        self.implementations[name] = backend.Implementation(load or by_name[name], combined if refuses else general)

    def register_autograd(
        self,
        formula: Formula,
        *,
        saves: Callable[[Sequence[Any], Outputs], tuple[Sequence[Any], Sequence[Tensor]]] | None = None,
        non_differentiable: Iterable[str] = (),
    ) -> None:
        """Make the op differentiable.

        Args:
            formula: ``formula(grads, args, extras, mask)`` returns one gradient (or ``None``) per argument.
                ``grads`` holds one gradient per output, ``None`` where nothing flowed; ``mask[i]`` says whether the
                gradient of argument ``i`` is asked for.
            saves: ``saves(args, outputs)`` returns the arguments and the extra tensors kept for the backward. The
                arguments may be replaced by others that give the same outputs: for a sum, the sum and ``ZERO``.
            non_differentiable: outputs, by their name in ``returns``, that gradients do not flow through.

        Under ``create_graph`` the definition is differentiated instead, so gradients of any order are right.
        """
        fixed = self.non_differentiable = frozenset(self.returns.index(name) for name in non_differentiable)

        def setup_context(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            args, extras = saves(inputs, outputs) if saves else (inputs, ())
            tensors = [a for a in args if isinstance(a, Tensor)]
            ctx.save_for_backward(*tensors, *extras)
            ctx.others = [None if isinstance(a, Tensor) else (a,) for a in args]
            ctx.mark_non_differentiable(*[outputs[i] for i in fixed])
            ctx.set_materialize_grads(False)
            ctx.backend = backend.forced()

        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            saved = iter(ctx.saved_tensors)
            args = [next(saved) if other is None else other[0] for other in ctx.others]
            mask = list(ctx.needs_input_grad)
            if all(g is None for g in grads):
                return (None,) * len(args)
            if torch.is_grad_enabled():
                return _differentiate(self.definition, args, grads, mask)
            with nullcontext() if ctx.backend is None else backend.use_backend(ctx.backend):
                result = formula(grads, args, tuple(saved), mask)
            return tuple(g if needed else None for g, needed in zip(result, mask, strict=True))

        def forward(ctx: Any, *args: Any) -> Any:
            output = self._run(*args)
            setup_context(ctx, args, output)
            return output

        torch.library.register_autograd(f"dlops::{self.name}", backward, setup_context=setup_context, lib=library)
        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self._function = type(self.name, (torch.autograd.Function,), methods)

    @property
    def differentiable(self) -> bool:
        return self._function is not None

    def _run(self, *args: Any) -> Any:
        self.check(*args)
        return backend.select(self, args)(*args)

    def _fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        def checked(*args: Any) -> Any:
            self.check(*args)
            return fake(*args)

        return checked

    def _autocast_kernel(self, device: str) -> Callable[..., Any]:
        # torch.library.register_autocast knows one dtype; the context may ask for another, and a backward for none.
        lower = self._autocast.get(device, torch.uint8) is None
        fixed = self._autocast.get(device)

        def kernel(*args: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
                if lower or fixed is not None:
                    dtype = fixed or torch.get_autocast_dtype(device)
                    args = tuple(_cast(a, device, dtype) for a in args)
                return self._overload(*args)

        return kernel

    def _load_cpu(self) -> Callable[..., Any]:
        return getattr(torch.ops.dlops_cpu, self.name).default._op

    def _load_cuda(self) -> Callable[..., Any]:
        library = torch.ops.dlops_simt if backend.cuda_emulated() else torch.ops.dlops_cuda
        return getattr(library, self.name).default._op

    def _load_triton(self) -> Callable[..., Any]:
        return getattr(self._kernels(), self.name)

    def _kernels(self) -> Any:
        return importlib.import_module(f"dlops.kernels.{self.family}")

    def _refuses_triton(self, *args: Any) -> str | None:
        device = "cpu" if backend.triton_interpreted() else "cuda"
        return _refuses(args, device) or self._kernels().unsupported(self.name, *args)


def op(
    definition: Callable[..., Any] | None = None,
    *,
    check: Callable[..., None] | None = None,
    fake: Callable[..., Any] | None = None,
    autocast: Mapping[str, torch.dtype | None] | None = None,
    returns: Sequence[str] = ("out",),
) -> Any:
    """Register ``definition`` (annotated, positional, functional) as a dlops op.

    Args:
        check: called with the op's arguments first on every path; raises what torch raises for the same mistake.
        fake: shape function, where the definition cannot serve (it loops over a tensor size).
        autocast: device type to the dtype floating-point arguments are cast to under autocast; ``None`` as the dtype
            means the one the context asks for. A device that is absent casts nothing.
        returns: names of the outputs.
    """

    def register(definition: Callable[..., Any]) -> Op:
        return Op(definition, check=check, fake=fake, autocast=autocast, returns=returns)

    return register(definition) if definition is not None else register


def default_rule(*args: Any) -> Sequence[str]:
    """Preference on a device nobody has measured: torch's fused op where there is one, else a kernel."""
    x = next(a for a in args if isinstance(a, Tensor))
    if x.is_cuda:
        return ("vendor", "cuda", "triton", "torch")
    return ("vendor", "cpu", "torch") if x.is_cpu else ("torch",)


def _ordinary(args: Sequence[Any]) -> bool:
    """Whether the dispatcher would only pass the call on to the op's kernel and its autograd formula: plain tensors, no
    mode, transform, autocast or profiler. Such calls skip it, which saves half of an op call's host time."""
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._is_any_autocast_enabled()
        or _profiler_enabled()
    ):
        return False
    for a in args:  # a plain loop: a generator would cost more than the rest
        if isinstance(a, Tensor) and torch._C._dispatch_keys(a).raw_repr() not in _PLAIN_KEYS:
            return False
    return True


def _differentiate(
    definition: Callable[..., Any], args: Sequence[Any], grads: Sequence[Tensor | None], mask: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    # An alias per argument: one tensor passed twice gets two gradients, not their sum twice.
    args = [torch.zeros_like(args[0], requires_grad=True) if a is ZERO else a for a in args]
    aliases = [a.view_as(a) if isinstance(a, Tensor) else a for a in args]
    outputs = definition(*aliases)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    flowing = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
    wanted = [a for a, needed in zip(aliases, mask, strict=True) if needed]
    found = iter(
        torch.autograd.grad(
            [o for o, _ in flowing], wanted, [g for _, g in flowing], create_graph=True, allow_unused=True
        )
        if flowing
        else [None] * len(wanted)
    )
    return tuple(next(found) if needed else None for needed in mask)


def _cast(value: Any, device: str, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor) and value.device.type == device and value.dtype != torch.float64:
        return value.to(dtype) if value.is_floating_point() else value
    return value


def _accepts_anything(*args: Any) -> None:
    return None


def _refuses_nothing(*args: Any) -> str | None:
    return None


def _refuses(args: Sequence[Any], device: str) -> str | None:
    # The first argument speaks for all: an op's check has compared them, and runs on every host call's path.
    x = args[0]
    if not (x.is_cpu if device == "cpu" else x.is_cuda):
        return f"it runs on {device} tensors, got one on {x.device}"
    if x.dtype not in backend.KERNEL_DTYPES:
        return f"it serves float32, bfloat16 and float16, got {x.dtype}"
    return None


def _refuses_cpu(*args: Any) -> str | None:
    return _refuses(args, "cpu")


def _refuses_cuda(*args: Any) -> str | None:
    return _refuses(args, "cpu" if backend.cuda_emulated() else "cuda")
