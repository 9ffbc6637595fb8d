"""@op: one definition in plain PyTorch becomes a registered, differentiable, dispatched operator."""

import functools
import importlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import _profiler_enabled, forward_ad  # pyright: ignore[reportPrivateImportUsage]
from torch.nn import Parameter

from dlops import backend

Outputs = tuple[Any, ...]
Autocast = torch.dtype | Callable[[str, Sequence[Any]], torch.dtype]
Formula = Callable[[Outputs, Sequence[Any], Sequence[Tensor], list[bool]], Sequence[Tensor | None]]

library = torch.library.Library("dlops", "DEF")
registry: dict[str, "Op"] = {}


def _keys(name: str) -> torch._C.DispatchKeySet:
    return torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name))


_AUTOCAST_KEYS = _keys("AutocastCPU") | _keys("AutocastCUDA")
_VIEW_KEYS = _keys("ADInplaceOrView")  # they remember what is a view: autograd forbids writing to an output that is one
_REMEMBERED = 1024  # signatures per op


def acc(x: Tensor) -> Tensor:
    """``x`` in the dtype that reductions accumulate in: float32, or float64 for float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def sum_rows(x: Tensor) -> Tensor:
    """The sum of ``x`` over all but its last dimension."""
    return as_rows(x).sum(0)


def as_rows(x: Tensor) -> Tensor:
    """``x`` with its leading dimensions flattened into one: (..., D) as (M, D)."""
    if x.dim() == 2:
        return x
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])  # flatten has no batching rule here


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
        autocast: Mapping[str, Autocast] | None,
        returns: Sequence[str],
        mutates: Sequence[str],
    ) -> None:
        self.name: str = definition.__name__
        self.family: str = definition.__module__.rpartition(".")[2]
        self.definition = definition
        self.returns = tuple(returns)
        self.mutates = tuple(mutates)
        self.non_differentiable: frozenset[int] = frozenset()
        self._apply: Callable[..., Any] | None = None
        self._chosen: dict[tuple[Any, ...], Callable[..., Any]] = {}
        self.implementations: dict[str, backend.Implementation] = {}
        self.rule: Callable[..., Sequence[str]] = default_rule
        self.check = check or _accepts_anything
        self._autocast = autocast or {}
        self.__doc__ = definition.__doc__
        library.define(
            self.name + torch.library.infer_schema(definition, mutates_args=self.mutates),
            tags=(torch.Tag.pt2_compliant_tag,),
        )
        self._overload = getattr(torch.ops.dlops, self.name).default
        arguments = self._overload._schema.arguments
        self.argument_names = [argument.name for argument in arguments]
        self._required = [str(argument.type) == "Tensor" for argument in arguments]
        self._mutated = [self.argument_names.index(name) for name in self.mutates]
        if self.mutates:
            library.impl(self.name, self._below_autograd, "Autograd", with_keyset=True)
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
            backend.note(self, "torch", "the definition, which torch.func and forward-mode AD can differentiate")
            return self.definition(*args)
        signature = _signature(args)
        if signature is None:
            return self._overload(*args)
        run = self._chosen.get(signature) or self._choose(args, signature)
        if self.mutates:
            return self._write(run, args)
        if torch._C.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return self._apply(run, *args) if self._apply else self._overload(*args)
        return run(*args)

    def __repr__(self) -> str:
        return f"dlops op {self._overload._schema}"

    def implement(
        self,
        name: str,
        load: Callable[[], Callable[..., Any]] | None = None,
        refuses: Callable[..., str | None] | None = None,
        dtypes: Sequence[torch.dtype] = backend.KERNEL_DTYPES,
    ) -> None:
        """Add the implementation ``name``. Without ``load`` it is found by the op's name: ``dlops_cpu::<op>``,
        ``dlops_cuda::<op>`` (``dlops_simt::<op>`` where CUDA is emulated), or ``dlops.kernels.<family>.<op>`` with the
        ``unsupported`` beside it.

        Args:
            name: a backend.
            load: returns the callable; called once, when the backend is first used.
            refuses: called with the op's arguments, returns why they cannot be served, or ``None``. It looks at
                shapes, dtypes, devices and plain values only, as does the rule: the answer is remembered for them.
            dtypes: what a kernel serves, of the first argument.
        """
        by_name = {"cpu": self._load_cpu, "cuda": self._load_cuda, "triton": self._load_triton}
        devices = {"cpu": _refuses_cpu, "cuda": _refuses_cuda, "triton": self._refuses_triton}
        refusing = devices.get(name)
        general = functools.partial(refusing, dtypes) if refusing else _refuses_nothing

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
        """Make the op, whose tensors come before its other arguments, differentiable.

        Args:
            formula: ``formula(grads, args, extras, mask)`` returns one gradient (or ``None``) per argument.
                ``grads`` holds one gradient per output, ``None`` where nothing flowed; ``mask[i]`` says whether the
                gradient of argument ``i`` is asked for.
            saves: ``saves(args, outputs)`` returns the arguments and the extra tensors kept for the backward. The
                arguments may be replaced by others that give the same outputs: for a sum, the sum and ``None``, which
                stands for a zero where the op asks for a tensor.
            non_differentiable: outputs, by their name in ``returns``, that gradients do not flow through.

        Under ``create_graph`` the definition is differentiated instead, so gradients of any order are right.
        """
        assert not self.mutates, f"{self!r}: what is written in place has no gradient"
        fixed = self.non_differentiable = frozenset(self.returns.index(name) for name in non_differentiable)
        kinds = ["Tensor" in str(argument.type) for argument in self._overload._schema.arguments]
        tensors = sum(kinds)
        assert all(kinds[:tensors]), f"{self!r}: tensors come first"

        def setup_context(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            args, extras = saves(inputs, outputs) if saves else (inputs, ())
            ctx.save_for_backward(*args[:tensors], *extras)
            ctx.call = args[tensors:], backend.forced()
            ctx.mark_non_differentiable(*[outputs[i] for i in fixed])
            ctx.set_materialize_grads(False)

        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            saved = ctx.saved_tensors
            values, name = ctx.call
            args = (*saved[:tensors], *values)
            mask = list(ctx.needs_input_grad[-len(args) :])
            if all(g is None for g in grads):
                return (None,) * len(args)
            if torch.is_grad_enabled():
                return self._differentiate(args, grads, mask)
            with nullcontext() if name is None else backend.use_backend(name):
                result = formula(grads, args, saved[tensors:], mask)
            return tuple([g if needed else None for g, needed in zip(result, mask, strict=True)])

        torch.library.register_autograd(f"dlops::{self.name}", backward, setup_context=setup_context, lib=library)

        # The same for calls that skip the dispatcher: the implementation that was chosen comes first.
        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, run: Callable[..., Any], *args: Any) -> Any:
                with torch._C._ExcludeDispatchKeyGuard(_VIEW_KEYS):
                    output = run(*args)
                setup_context(ctx, args, output)
                return output

            @staticmethod
            def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
                return (None, *backward(ctx, *grads))

        Function.__name__ = self.name
        base: Any = super(torch.autograd.Function, Function)  # up to torch 2.14 Function wraps its apply for torch.func
        self._apply = base.apply

    @property
    def differentiable(self) -> bool:
        return self._apply is not None

    def _write(self, run: Callable[..., Any], args: Sequence[Any]) -> Any:
        """``run`` for an op that writes in place: autograd must not miss it, nor take it for a constant."""
        if torch._C.is_grad_enabled() and torch._C._any_requires_grad(*args):
            written = " and ".join(self.mutates)
            raise RuntimeError(
                f"{self.name}: it writes {written} in place and has no gradient; call it under torch.no_grad(), or "
                f"pass tensors that do not require one"
            )
        for i in self._mutated:
            if args[i].is_neg():  # kernels see memory without its sign, and torch's fallback fails on what is written
                name = self.argument_names[i]
                raise RuntimeError(
                    f"{self.name}: it writes {name} in place, which is a negated view; accepted are others"
                )
        result = run(*args)
        torch.autograd.graph.increment_version([args[i] for i in self._mutated])
        return result

    def _below_autograd(self, keys: torch._C.DispatchKeySet, *args: Any) -> Any:
        def run(*args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return self._overload.redispatch(keys & torch._C._after_autograd_keyset, *args)

        return self._write(run, args)

    def _run(self, *args: Any) -> Any:
        self.check(*args)
        with torch._C._ExcludeDispatchKeyGuard(_VIEW_KEYS):
            return backend.select(self, args)(*args)

    def _differentiate(
        self, args: Sequence[Any], grads: Sequence[Tensor | None], mask: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        # A tensor that was saved as None is zero. An alias per argument: one passed twice gets two gradients, not their
        # sum twice.
        aliases: list[Any] = []
        for a, required in zip(args, self._required, strict=True):
            given = torch.zeros_like(args[0], requires_grad=True) if a is None and required else a
            aliases.append(given.view_as(given) if isinstance(given, Tensor) else given)
        outputs = self.definition(*aliases)
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

    def _choose(self, args: Sequence[Any], signature: tuple[Any, ...]) -> Callable[..., Any]:
        self.check(*args)
        run = backend.select(self, args)
        if not backend.recording():
            if len(self._chosen) >= _REMEMBERED:
                self._chosen.clear()
            self._chosen[signature] = run
        return run

    def _fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        def checked(*args: Any) -> Any:
            self.check(*args)
            return fake(*args)

        return checked

    def _autocast_kernel(self, device: str) -> Callable[..., Any]:
        # torch.library.register_autocast knows one dtype; the context may ask for another, and a backward for none.
        target = self._autocast.get(device)

        def kernel(*args: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
                if target is not None:
                    dtype = target(device, args) if callable(target) else target
                    args = tuple(_cast(a, device, dtype) for a in args)
                return self._overload(*args)

        return kernel

    def _load_cpu(self) -> Callable[..., Any]:
        return getattr(torch.ops.dlops_cpu, self.name).default._op

    def _load_cuda(self) -> Callable[..., Any]:
        return getattr(backend.cuda_library(), self.name).default._op

    def _load_triton(self) -> Callable[..., Any]:
        launch = getattr(self._kernels(), self.name)

        def run(*args: Any) -> Any:  # the other backends' tensors meet torch's dispatcher, which resolves the sign
            return launch(*[a.resolve_neg() if isinstance(a, Tensor) else a for a in args])

        return run

    def _kernels(self) -> Any:
        return importlib.import_module(f"dlops.kernels.{self.family}")

    def _refuses_triton(self, dtypes: Sequence[torch.dtype], *args: Any) -> str | None:
        device = "cpu" if backend.triton_interpreted() else "cuda"
        return _refuses(args, device, dtypes) or self._kernels().unsupported(self.name, *args)


def op(
    definition: Callable[..., Any] | None = None,
    *,
    check: Callable[..., None] | None = None,
    fake: Callable[..., Any] | None = None,
    autocast: Mapping[str, Autocast] | None = None,
    returns: Sequence[str] = ("out",),
    mutates: Sequence[str] = (),
) -> Any:
    """Register ``definition`` (annotated, positional, functional but for ``mutates``) as a dlops op.

    Args:
        check: called with the op's arguments first on every path; raises what torch raises for the same mistake.
        fake: shape function, where the definition cannot serve (it loops over a tensor size).
        autocast: device type to the dtype that floating-point arguments are cast to under autocast, or to a function
            that finds it: :func:`context_dtype`, :func:`widest_dtype`. A device that is absent casts nothing.
        returns: names of the outputs.
        mutates: arguments that the op writes to. It then has no gradient, and raises where one is asked for.
    """

    def register(definition: Callable[..., Any]) -> Op:
        return Op(definition, check=check, fake=fake, autocast=autocast, returns=returns, mutates=mutates)

    return register(definition) if definition is not None else register


def default_rule(*args: Any) -> Sequence[str]:
    """Preference on a device nobody has measured: torch's fused op where there is one, else a kernel."""
    x = next(a for a in args if isinstance(a, Tensor))
    if x.is_cuda:
        return ("vendor", "cuda", "triton", "torch")
    return ("vendor", "cpu", "torch") if x.is_cpu else ("torch",)


def _signature(args: Sequence[Any]) -> tuple[Any, ...] | None:
    """All that the checks and the choice of a backend depend on, or None where the dispatcher would do more than pass
    the call on: for subclasses of tensors, modes, autocast, torch.jit.trace, a profiler."""
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._is_any_autocast_enabled()
        or torch._C._get_tracing_state() is not None
        or _profiler_enabled()
    ):
        return None
    signature: list[Any] = [backend.forced(), backend.recording()]
    for a in args:
        kind = type(a)
        if kind is Tensor or kind is Parameter:
            signature += (a.device, a.dtype, a.shape)
        elif kind is list:
            signature.append(tuple(a))
        elif isinstance(a, Tensor):
            return None
        else:
            signature.append(a)
    return tuple(signature)


def context_dtype(device: str, args: Sequence[Any]) -> torch.dtype:
    """The dtype that the autocast context asks for."""
    return torch.get_autocast_dtype(device)


def widest_dtype(device: str, args: Sequence[Any]) -> torch.dtype:
    """The dtype that torch promotes the floating-point arguments to."""
    dtypes = (a.dtype for a in args if isinstance(a, Tensor) and a.is_floating_point())
    return functools.reduce(torch.promote_types, dtypes)


def _cast(value: Any, device: str, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor) and value.device.type == device and value.dtype != torch.float64:
        return value.to(dtype) if value.is_floating_point() else value
    return value


def _accepts_anything(*args: Any) -> None:
    return None


def _refuses_nothing(*args: Any) -> str | None:
    return None


def _refuses(args: Sequence[Any], device: str, dtypes: Sequence[torch.dtype]) -> str | None:
    # The first argument speaks for all: an op's check has compared them, and runs on every host call's path.
    x = args[0]
    if not (x.is_cpu if device == "cpu" else x.is_cuda):
        return f"it runs on {device} tensors, got one on {x.device}"
    if x.dtype not in dtypes:
        *some, last = [str(dtype).removeprefix("torch.") for dtype in dtypes]
        return f"it serves {', '.join(some)} and {last}, got {x.dtype}"
    return None


def _refuses_cpu(dtypes: Sequence[torch.dtype], *args: Any) -> str | None:
    return _refuses(args, "cpu", dtypes)


def _refuses_cuda(dtypes: Sequence[torch.dtype], *args: Any) -> str | None:
    return _refuses(args, "cpu" if backend.cuda_emulated() else "cuda", dtypes)
