"""Which Linear -> activation pairs of a model may be fused, proved by tracing what calls them with torch.fx.

A pair is proven when every call of the activation takes the output of such a linear, the linear is called once by one
module and nothing else takes its output. The calls are read off the traced forward of the modules that hold the two, in
training and evaluation, with and without gradients, and with optional arguments given and left out; a forward that
decides by what a trace does not see proves nothing. No other module above them may reach past that forward: its
code does not name them, or its own trace does not call them.
"""

import contextlib
import copy
import dis
import gc
import inspect
import itertools
import random
import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import NoReturn

import torch
from torch import fx
from torch.fx.proxy import TraceError
from torch.nn import Module

_ACTIVATIONS = {
    "torch.nn.modules.activation": {
        "ELU": "elu",
        "GELU": "gelu",
        "Hardswish": "hardswish",
        "LeakyReLU": "leaky_relu",
        "Mish": "mish",
        "ReLU": "relu",
        "SiLU": "silu",
        "Sigmoid": "sigmoid",
        "Softplus": "softplus",
        "Tanh": "tanh",
    },
    "transformers.activations": {
        "AccurateGELUActivation": "gelu_tanh",
        "FastGELUActivation": "gelu_tanh",
        "GELUActivation": "gelu",
        "GELUTanh": "gelu_tanh",
        "MishActivation": "mish",
        "NewGELUActivation": "gelu_tanh",
        "PytorchGELUTanh": "gelu_tanh",
        "ReLUSquaredActivation": "relu2",
        "SiLUActivation": "silu",
    },
    "timm.layers.activations": {
        "GELU": "gelu",
        "GELUTanh": "gelu_tanh",
        "HardSwish": "hardswish",
        "Mish": "mish",
        "Sigmoid": "sigmoid",
        "Swish": "silu",
        "Tanh": "tanh",
    },
}
_PARAMETERS = {"elu": ("alpha",), "leaky_relu": ("negative_slope",), "softplus": ("beta", "threshold")}
_HARMLESS = (object, Module, torch.nn.Sequential, torch.nn.ModuleList, torch.nn.ModuleDict)
# What leads from a module to any other below it.
_REACHES = {"_modules", "apply", "children", "modules", "named_children", "named_modules", "get_submodule", "__dict__"}
# What a forward may decide by without a trace noticing: the kind of its input, and the state of the process.
_UNSEEN = {
    "callable",
    "hasattr",
    "is_autocast_enabled",
    "is_compiling",
    "is_dynamo_compiling",
    "is_exporting",
    "is_inference_mode_enabled",
    "type",
}
_REGISTERED = vars(Module()).keys()
_TAKES_FROM_SELF = {  # the instructions after one that loads self
    *("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "STORE_ATTR", "DELETE_ATTR", "COPY", "DUP_TOP"),
    *("CONVERT_VALUE", "FORMAT_SIMPLE", "FORMAT_VALUE"),
}
_INITIALIZERS = ("__init__", "_init_weights", "init_weights", "reset_parameters")  # handle children, never run them
_NAMES = {name for names in _ACTIVATIONS.values() for name in names.values()}


def activation_of(module: Module) -> tuple[str, dict[str, float]] | None:
    """The name and parameters ``functional.linear_act`` knows this activation module by; None for any other module."""
    name = _ACTIVATIONS.get(type(module).__module__, {}).get(type(module).__qualname__)
    if name == "gelu" and getattr(module, "approximate", "none") == "tanh":
        name = "gelu_tanh"
    return (name, {p: float(getattr(module, p)) for p in _PARAMETERS.get(name, ())}) if name else None


class Unproven(Exception):
    """Why a pair is left alone."""


class Prover:
    """Proves pairs in one model.

    Args:
        model: the model; only read.
        is_linear: which modules may be a pair's linear.
        obstacle: why a module must not be fused whatever calls it (hooks, an overridden forward), or None.
    """

    def __init__(
        self, model: Module, is_linear: Callable[[Module], bool], obstacle: Callable[[Module], str | None]
    ) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self.is_linear, self.obstacle = is_linear, obstacle
        self._holders: dict[Module, list[tuple[Module, str]]] = {module: [] for module in self.names}
        for holder in self.names:
            for name, child in holder._modules.items():
                if child is not None:
                    self._holders[child].append((holder, name))
        self._traced: dict[Module, list[fx.Graph] | Unproven] = {}
        self._loaded: dict[type, _Loads] = {}
        self._stashed = {m: where for holder in self.names for where, m in _stashed(holder) if m in self.names}
        self._linear_callers = {c: None for m in self.names if is_linear(m) for c in self._callers(m)}

    def candidates(self) -> Iterator[Module]:
        """The activation modules that share a caller with a linear."""
        for module in self.names:
            if activation_of(module) and any(caller in self._linear_callers for caller in self._callers(module)):
                yield module

    def prove(self, activation: Module) -> list[Module]:
        """The linears whose outputs are all that ``activation`` is ever applied to; raises :class:`Unproven`."""
        calls = [(caller, *call) for caller in self._callers(activation) for call in self._calls(caller, activation)]
        linears = list(dict.fromkeys(self._producer(caller, node) for caller, _, node in calls))
        for module in (activation, *linears) if linears else ():
            self._no_other_way(module)
        for linear in linears:
            name, callers = self.names[linear], self._callers(linear)
            if len(callers) > 1:
                raise Unproven(f"{name} is called by {len(callers)} modules")
            uses = self._calls(callers[0], linear)
            if len({graph for graph, _ in uses}) < len(uses):
                raise Unproven(f"{name} is called more than once")
            for _, node in uses:
                if node.meta.get("kept"):
                    raise Unproven(f"{type(callers[0]).__name__}.forward keeps the linear's output")
                others = [u for u in node.users if _called(callers[0], u) is not activation]
                if others:
                    raise Unproven(f"the linear's output is also used by {_describe(callers[0], others[0])}")
        return linears

    def functions(self) -> Iterator[tuple[Module, str]]:
        """Linears whose output goes to an activation function: (linear, the function's name)."""
        for caller in self._linear_callers:
            graph = None
            with contextlib.suppress(Exception):
                graph = next(_trace(caller))
            for node in graph.nodes if graph else ():
                name = getattr(node.target, "__name__", node.target)
                if node.op in ("call_function", "call_method") and name in _NAMES and node.args:
                    linear = _called(caller, node.args[0])
                    if linear is not None and self.is_linear(linear):
                        yield linear, name

    def _producer(self, caller: Module, node: fx.Node) -> Module:
        if len(node.args) != 1 or node.kwargs:
            raise Unproven("the activation is not called with exactly one argument")
        linear = _called(caller, node.args[0])
        if linear is None or not self.is_linear(linear):
            raise Unproven(f"the activation's input comes from {_describe(caller, node.args[0])}, not from a Linear")
        return linear

    def _callers(self, module: Module) -> list[Module]:
        """The nearest modules above with a forward of their own (a ModuleList has none)."""
        nearest = [[h] if _has_forward(h) else self._callers(h) for h, _ in self._holders[module]]
        return list(dict.fromkeys(itertools.chain.from_iterable(nearest)))

    def _above(self, module: Module) -> dict[Module, None]:
        """All modules that contain this one, nearest first."""
        found = dict.fromkeys(holder for holder, _ in self._holders[module])
        for holder in tuple(found):
            found.update(self._above(holder))
        return found

    def _graphs(self, caller: Module) -> list[fx.Graph]:
        if caller not in self._traced:
            try:
                self._traced[caller] = list(_trace(caller))
            except Exception as error:
                message = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
                self._traced[caller] = Unproven(f"{type(caller).__name__}.forward cannot be traced: {message}")
        traced = self._traced[caller]
        if isinstance(traced, Unproven):
            raise traced
        return traced

    def _calls(self, caller: Module, module: Module) -> list[tuple[fx.Graph, fx.Node]]:
        return [(g, node) for g in self._graphs(caller) for node in g.nodes if _called(caller, node) is module]

    def _no_other_way(self, module: Module) -> None:
        """Raise :class:`Unproven` unless the module's callers are the only code of the model that calls it."""
        reason = self.obstacle(module)
        if reason:
            raise Unproven(f"{self.names[module]}: {reason}")
        if module in self._stashed:
            raise Unproven(f"{self._stashed[module]} holds {self.names[module]} too")
        direct, through = self._handles(module)
        callers = self._callers(module)
        for above in self._above(module):
            loads = self._loads(type(above))
            if above in callers:
                if any(loads.count[name] > 1 for name in direct):
                    raise Unproven(f"several methods of {type(above).__name__} use {self.names[module]}")
                continue
            named = any(loads.count[name] for name in direct) or through & loads.escapes
            if (
                (named or loads.reaches or "forward" in vars(above))
                and _has_forward(above)
                and self._calls(above, module)
            ):
                raise Unproven(f"{type(above).__name__}.forward calls {self.names[module]} itself")

    def _handles(self, module: Module) -> tuple[set[str], set[str]]:
        """The attribute names that reach a module directly, and those of containers it can be indexed out of."""
        direct = {name for _, name in self._holders[module] if not name.isdigit()}
        through: set[str] = set()
        for holder, _ in self._holders[module]:
            if hasattr(type(holder), "__getitem__"):
                through = through.union(*self._handles(holder))
        return direct, through

    def _loads(self, cls: type) -> "_Loads":
        if cls not in self._loaded:
            self._loaded[cls] = _Loads(cls)
        return self._loaded[cls]


class _Loads:
    """What the code of a class takes from its instances.

    Attributes:
        count: how many of its functions load each attribute.
        escapes: the attributes that they do not merely call.
        reaches: whether ``forward``, or a method it leads to, may get at modules without naming them.
    """

    def __init__(self, cls: type) -> None:
        functions: dict[str, object] = {}
        for base in reversed(cls.__mro__):
            if base not in _HARMLESS:
                functions.update(vars(base))
        for name in _INITIALIZERS:
            functions.pop(name, None)
        codes: dict[str, CodeType] = {}
        for name, function in functions.items():
            function = getattr(function, "fget", None) or getattr(function, "__func__", function)
            code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
            if code is not None:
                codes[name] = code
        loads = {name: set(_attribute_loads(code)) for name, code in codes.items()}
        self.count = Counter(name for found in loads.values() for name in {name for name, _ in found})
        self.escapes = {name for found in loads.values() for name, is_call in found if not is_call}
        led_to = ["forward"]
        for method in led_to:
            led_to += [name for name, _ in loads.get(method, ()) if name in codes and name not in led_to]
        self.reaches = any(
            _passes_self_on(codes[method]) or _REACHES & {name for name, _ in loads[method]}
            for method in led_to
            if method in codes
        )


class _Proxy(fx.Proxy):
    """A proxy that notices ``isinstance``, whose answer would be another for a tensor."""

    tracer: "_Tracer"

    @property
    def __class__(self) -> type:  # type: ignore[override]
        if not _is_library(sys._getframe(1)):
            self.tracer.stop("isinstance of a tensor")
        return type(self)


class _Tracer(fx.Tracer):
    """Records what one forward calls; every submodule is a leaf."""

    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()
        self._proxies: list[weakref.ref[fx.Proxy]] = []
        self._stopped_by: str | None = None
        self._ran: set[CodeType] = set()

    def record(self, module: Module, arguments: dict[str, object]) -> fx.Graph:
        """The graph of a module's forward; raises ValueError where another call might take another way through it."""
        profile = sys.getprofile()
        sys.setprofile(self._watch)
        try:
            graph = self.trace(module, arguments or None)
        finally:
            sys.setprofile(profile)
        self._mark_kept()
        unseen = self._stopped_by or next(filter(None, map(_unseen, self._ran)), None)
        if unseen:
            raise ValueError(f"what it does may depend on {unseen}")
        return graph

    def stop(self, decision: str) -> NoReturn:
        """Raise TraceError, and fail in the end even if the forward catches it."""
        self._stopped_by = decision
        raise TraceError(f"it depends on {decision}")

    def to_bool(self, obj: fx.Proxy) -> bool:
        self.stop("the values of its input")

    def iter(self, obj: fx.Proxy) -> NoReturn:  # type: ignore[override]
        self.stop("the length of its input")

    def _watch(self, frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and not _is_library(frame):
            self._ran.add(frame.f_code)

    def is_leaf_module(self, m: Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        proxy = _Proxy(node, self)
        if isinstance(_called(self.root, node), torch.nn.Linear):
            self._proxies.append(weakref.ref(proxy))
        return proxy

    def _mark_kept(self) -> None:
        """Mark the linears whose output the forward left somewhere, as in ``self.hidden = x``."""
        if any(proxy() is not None for proxy in self._proxies):
            gc.collect()
        for proxy in self._proxies:
            if (alive := proxy()) is not None:
                alive.node.meta["kept"] = True


def _trace(module: Module) -> Iterator[fx.Graph]:
    """Trace a copy of a module (its tensors shared) in every mode and with its optional arguments given or not."""
    if "forward" in vars(module):
        raise ValueError("it is overridden on the instance")
    given = object()
    choices: dict[str, tuple[object, ...]] = {}
    for parameter in list(inspect.signature(type(module).forward).parameters.values())[1:]:
        if parameter.default is None or isinstance(parameter.default, bool):
            choices[parameter.name] = (None, given) if parameter.default is None else (False, True)
    if len(choices) > 4:
        raise ValueError(f"its {len(choices)} optional arguments make too many cases")
    attributes = (value for m in module.modules() for value in vars(m).values())
    tensors = [*module.parameters(), *module.buffers(), *(v for v in attributes if isinstance(v, torch.Tensor))]
    for training, gradients, *values in itertools.product((False, True), (False, True), *choices.values()):
        twin = copy.deepcopy(module, {id(t): t for t in tensors})
        for submodule in twin.modules():
            submodule.training = bool(training)
        arguments = {name: value for name, value in zip(choices, values, strict=True) if value is not given}
        state, torch_state = random.getstate(), torch.get_rng_state()
        try:
            with warnings.catch_warnings(), torch.set_grad_enabled(bool(gradients)):
                warnings.simplefilter("ignore")
                graph = _Tracer().record(twin, arguments)
            if random.getstate() != state or not torch.equal(torch.get_rng_state(), torch_state):
                raise ValueError("what it does depends on random numbers")
        finally:
            random.setstate(state)
            torch.set_rng_state(torch_state)
        yield graph


def _has_forward(module: Module) -> bool:
    return type(module).forward is not Module.forward or "forward" in vars(module)


def _called(caller: Module, node: object) -> Module | None:
    """The module that a node of ``caller``'s graph calls."""
    if isinstance(node, fx.Node) and node.op == "call_module":
        return caller.get_submodule(str(node.target))
    return None


def _describe(caller: Module, node: object) -> str:
    module = _called(caller, node)
    if module is not None or not isinstance(node, fx.Node):
        return type(module or node).__name__
    return {"placeholder": "an argument", "output": "the result"}.get(node.op, f"{node.target!s}".split()[-1])


def _is_library(frame: FrameType) -> bool:
    root = str(frame.f_globals.get("__name__")).partition(".")[0]
    return root in ("torch", "dlops") or root in sys.stdlib_module_names


def _stashed(holder: Module) -> Iterator[tuple[str, Module]]:
    """The modules that a module holds elsewhere than among its submodules: (attribute, module)."""
    for name, value in vars(holder).items():
        if name not in _REGISTERED:
            for found in _modules_in(value, 3):
                if found is holder:  # its own method, as in self.act = self.exact
                    continue
                yield from ((f"{type(holder).__name__}.{name}", module) for module in found.modules())


def _modules_in(value: object, depth: int) -> Iterator[Module]:
    if isinstance(value, Module):
        yield value
    elif isinstance(getattr(value, "__self__", None), Module):  # a method
        yield value.__self__  # type: ignore[attr-defined]
    elif depth and isinstance(value, (list, tuple, set, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _modules_in(item, depth - 1)


def _unseen(code: CodeType) -> str | None:
    """What code may decide by without a trace noticing."""
    instructions = list(dis.get_instructions(code))
    for before, this in itertools.pairwise(instructions):
        if this.opname.startswith("LOAD_") and this.argval in _UNSEEN:
            return f"{this.argval}()"
        if this.opname == "IS_OP" and not (before.opname == "LOAD_CONST" and before.argval is None):
            return "what an argument is"
    return None


def _passes_self_on(code: CodeType, name: str | None = None) -> bool:
    """Whether code does anything with its first argument but take attributes from it, ask for one, or print it."""
    name = name or next(iter(code.co_varnames[: code.co_argcount]), None)
    instructions = list(dis.get_instructions(code))
    for i, this in enumerate(instructions[:-1]):
        loaded = this.argval if isinstance(this.argval, tuple) else (this.argval,)
        if name not in loaded or not this.opname.startswith(("LOAD_FAST", "LOAD_DEREF")):
            continue
        before, following = instructions[i - 1], instructions[i + 1]
        asks = before.argval in ("getattr", "hasattr") and following.opname == "LOAD_CONST"
        if loaded[-1] != name or not (asks or following.opname in _TAKES_FROM_SELF):
            return True
    return any(_passes_self_on(inner, name) for inner in code.co_consts if isinstance(inner, CodeType))


def _attribute_loads(code: CodeType) -> Iterator[tuple[str, bool]]:
    """(name, whether it is called at once) of each attribute code loads, ``self.fc`` in ``self.fc.weight`` aside."""
    instructions = list(dis.get_instructions(code))
    for this, following in itertools.pairwise(instructions):
        is_load = this.opname in ("LOAD_ATTR", "LOAD_METHOD")
        if is_load and (_is_method(this) or following.opname != "LOAD_ATTR" or _is_method(following)):
            yield this.argval, _is_method(this)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _attribute_loads(constant)
        elif isinstance(constant, str):
            yield from ((part, False) for part in constant.split("."))


def _is_method(instruction: dis.Instruction) -> bool:
    return instruction.opname == "LOAD_METHOD" or "NULL" in instruction.argrepr
