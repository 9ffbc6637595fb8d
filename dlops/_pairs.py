"""Which Linear -> activation pairs of a model may be fused, proved by tracing what calls them with torch.fx.

A pair is proven when every call of the activation takes the output of such a linear, the linear is called once by one
module and nothing else takes its output. The calls are read off the traced forward of the modules that hold the two, in
training and evaluation, with and without gradients, and with optional arguments given and left out; a forward that
decides by what a trace does not see proves nothing. No other module above them may reach past that forward: its
code does not name them, or its own trace does not call them. And nothing that a forward uses besides the submodules
(an object, a closure, a global) may lead to them.
"""

import contextlib
import copy
import dis
import functools
import gc
import inspect
import itertools
import pickle
import random
import sys
import warnings
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from types import CodeType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any, NoReturn

import torch
from torch import fx
from torch.fx.proxy import Attribute, TraceError
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
    "is_tensor",
    "suppress",
    "type",
}
_OFTEN_NONE = ("_base", "_grad", "_grad_fn", "grad", "grad_fn")  # attributes of a tensor
_CATCHES = ("CHECK_EXC_MATCH", "CHECK_EG_MATCH", "JUMP_IF_NOT_EXC_MATCH")  # the instructions of an except clause
# What Python asks of a tensor and a proxy cannot answer: method -> what the code may depend on.
_ASKED = {
    **dict.fromkeys(("__str__", "__repr__", "__format__"), "a tensor or its attribute as text"),
    "__hash__": "a tensor or its attribute as a key",
    "__len__": "the length of its input",
    **dict.fromkeys(("__array__", "__complex__", "__float__", "__index__", "__int__"), "the values of its input"),
}
_OWN = ("torch", "dlops")
_AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")
_REGISTERED = vars(Module()).keys()
_TAKES_FROM_SELF = {  # the instructions after one that loads self
    *("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "STORE_ATTR", "DELETE_ATTR", "COPY", "DUP_TOP"),
    *("CONVERT_VALUE", "FORMAT_SIMPLE", "FORMAT_VALUE"),
}
_INITIALIZERS = ("__init__", "_init_weights", "init_weights", "reset_parameters")  # handle children, never run them
_Calls = dict[Module, list[tuple[fx.Graph, fx.Node]]]
_Source = tuple[str, Module | None, object]  # the words for it, the module whose attribute it is, the object
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
        self._traced: dict[Module, _Calls | Unproven] = {}
        self._loaded: dict[type, _Loads] = {}
        self._stashed = {module: where for where, module in self._stashes() if module in self.names}
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
        source = node.args[0]
        linear = _called(caller, source)
        if not isinstance(source, fx.Node) or linear is None or not self.is_linear(linear):
            raise Unproven(f"the activation's input comes from {_describe(caller, source)}, not from a Linear")
        if node.meta["modes"] != source.meta["modes"]:
            raise Unproven("gradients or autocast are switched between the linear and the activation")
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

    def _calls(self, caller: Module, module: Module) -> list[tuple[fx.Graph, fx.Node]]:
        """Where the traces of a caller call a module."""
        if caller not in self._traced:
            calls: _Calls = defaultdict(list)
            try:
                for graph in _trace(caller):
                    for node in graph.nodes:
                        if (called := _called(caller, node)) is not None:
                            calls[called].append((graph, node))
                self._traced[caller] = calls
            except Exception as error:
                message = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
                self._traced[caller] = Unproven(f"{type(caller).__name__}.forward cannot be traced: {message}")
        traced = self._traced[caller]
        if isinstance(traced, Unproven):
            raise traced
        return traced.get(module, [])

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
            named = any(loads.count[name] or name in loads.of_helpers for name in direct) or through & loads.escapes
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

    def _stashes(self) -> Iterator[tuple[str, Module]]:
        """The modules that the model holds elsewhere than among the submodules of its modules: (where, module)."""
        classes = {type(holder): self._loads(type(holder)) for holder in self.names}
        used, grown = set(), {"forward"}  # the names that the forwards use, and the methods they lead to
        while grown - used:
            used |= grown
            grown = {name for loads in classes.values() for name in loads.used_by(used)}
        containers: list[_Source] = []
        sources: list[_Source] = [
            (f"{cls.__name__}.{name}", None, function)
            for cls, loads in classes.items()
            for name, function in loads.functions.items()
            if name in used and not _is_library(function.__globals__)
        ]
        for holder in self.names:
            cls = type(holder)
            for name, value in vars(holder).items():
                if name not in _REGISTERED:
                    in_use = name in used or classes[cls].reaches
                    (sources if in_use else containers).append((f"{cls.__name__}.{name}", holder, value))
        yield from _reached(containers, _items, 4)
        yield from _reached(sources, _referents, 9)


class _Loads:
    """What the code of a class takes from its instances.

    Attributes:
        functions: its functions, unwrapped, by name; without those that only initialise.
        count: how many of its functions load each attribute.
        escapes: the attributes that they do not merely call.
        of_helpers: the attributes that functions load which these lead to, of whatever is passed to them.
        reaches: whether ``forward``, or a method it leads to, may get at modules without naming them.
    """

    def __init__(self, cls: type) -> None:
        found: dict[str, object] = {}
        for base in reversed(cls.__mro__):
            if base not in _HARMLESS:
                found.update(vars(base))
        for name in _INITIALIZERS:
            found.pop(name, None)
        self.functions: dict[str, FunctionType] = {}
        for name, value in found.items():
            function = getattr(value, "fget", None) or getattr(value, "__func__", value)
            function = inspect.unwrap(function) if callable(function) else None
            if isinstance(function, FunctionType):
                self.functions[name] = function
        codes = {name: function.__code__ for name, function in self.functions.items()}
        self._loads = loads = {name: set(_attribute_loads(code)) for name, code in codes.items()}
        self.count = Counter(name for found in loads.values() for name in {name for name, _ in found})
        self.escapes = {name for found in loads.values() for name, is_call in found if not is_call}
        self.of_helpers = set(itertools.chain.from_iterable(map(_loads_of_helpers, self.functions.values())))
        led_to = ["forward"]
        for method in led_to:
            led_to += [name for name, _ in loads.get(method, ()) if name in codes and name not in led_to]
        self.reaches = any(
            _passes_self_on(codes[method]) or _REACHES & {name for name, _ in loads[method]}
            for method in led_to
            if method in codes
        )

    def used_by(self, methods: set[str]) -> Iterator[str]:
        """The attributes loaded by those methods, and by those that Python calls by itself."""
        for method, found in self._loads.items():
            if method in methods or method.startswith("__"):
                yield from (name for name, _ in found)


class _Proxy(fx.Proxy):
    """A proxy that notices being asked what it would answer otherwise than a tensor (see also ``_ASKED``)."""

    tracer: "_Tracer"

    @property
    def __class__(self) -> type:  # type: ignore[override]
        self._asked_for("isinstance of a tensor")
        return type(self)

    def __getattr__(self, k: str) -> "_Attribute":
        if k in _OFTEN_NONE or (not hasattr(torch.Tensor, k) and "getattr" in sys._getframe(1).f_code.co_names):
            self._asked_for(f"whether a tensor has an attribute {k}")
        return _Attribute(self, k)

    def _asked_for(self, decision: str) -> None:
        """Stop the trace, unless it is torch that asks."""
        frame = sys._getframe(2)
        while frame.f_back and (  # functools, abc, a class that answers isinstance by itself: for whom?
            _root(frame.f_globals) in sys.stdlib_module_names or frame.f_code.co_name == "__instancecheck__"
        ):
            frame = frame.f_back
        if _root(frame.f_globals) not in _OWN:
            self.tracer.stop(decision)


class _Attribute(_Proxy, Attribute):
    """What an attribute of a proxy is."""


def _asking(method: str, decision: str) -> Callable[..., object]:
    def asked(proxy: _Proxy, *arguments: object) -> object:
        proxy._asked_for(decision)
        answer = getattr(fx.Proxy, method, None)
        if answer is None:
            raise TypeError(f"a proxy has no {method}")
        return answer(proxy, *arguments)

    return asked


for _method, _decision in _ASKED.items():
    setattr(_Proxy, _method, _asking(_method, _decision))


class _Tracer(fx.Tracer):
    """Records what one forward calls; every submodule is a leaf."""

    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()
        self._proxies: list[weakref.ref[fx.Proxy]] = []
        self._stopped_by: str | None = None
        self._ran: dict[CodeType, dict[str, object]] = {}

    def record(self, module: Module, arguments: dict[str, object]) -> fx.Graph:
        """The graph of a module's forward; raises ValueError where another call might take another way through it."""
        profile, collects = sys.getprofile(), gc.isenabled()
        gc.disable()  # its callbacks and finalizers (hypothesis has one) would seem to be called by the forward
        sys.setprofile(self._watch)
        try:
            graph = self.trace(module, arguments or None)
        finally:
            sys.setprofile(profile)
            if collects:
                gc.enable()
        self._mark_kept()
        if any(node.op == "placeholder" and str(node.target).startswith("**") and node.users for node in graph.nodes):
            self._stopped_by = "optional arguments that its signature does not name"
        unseen = self._stopped_by or next(filter(None, itertools.starmap(_unseen, self._ran.items())), None)
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
        if event == "call" and not _is_library(frame.f_globals):
            self._ran[frame.f_code] = frame.f_globals

    def is_leaf_module(self, m: Module, module_qualified_name: str) -> bool:
        return True

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        autocast = [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in _AUTOCAST_DEVICES]
        node.meta["modes"] = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast
        return node

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
    attributes = [value for m in module.modules() for value in vars(m).values()]
    if any(isinstance(value, _random_generators()) for value in attributes):
        raise ValueError("it holds a generator of random numbers")
    tensors = [*module.parameters(), *module.buffers(), *(v for v in attributes if isinstance(v, torch.Tensor))]
    for training, gradients, *values in itertools.product((False, True), (False, True), *choices.values()):
        twin = copy.deepcopy(module, {id(t): t for t in tensors})
        for submodule in twin.modules():
            submodule.training = bool(training)
        arguments = {name: value for name, value in zip(choices, values, strict=True) if value is not given}
        with warnings.catch_warnings(), torch.set_grad_enabled(bool(gradients)), _without_randomness():
            warnings.simplefilter("ignore")
            graph = _Tracer().record(twin, arguments)
        yield graph


@contextlib.contextmanager
def _without_randomness() -> Iterator[None]:
    """Raises ValueError where the block draws from a global random number generator; puts its state back anyway."""
    sources: list[tuple[Callable[[], Any], Callable[[Any], object]]] = [
        (random.getstate, random.setstate),
        (lambda: torch.get_rng_state().tolist(), lambda s: torch.set_rng_state(torch.tensor(s, dtype=torch.uint8))),
    ]
    if numpy := sys.modules.get("numpy"):
        numpys = numpy.random
        sources.append(
            (lambda: pickle.dumps(numpys.get_state(legacy=False)), lambda s: numpys.set_state(pickle.loads(s)))
        )
    states = [get() for get, _ in sources]
    try:
        yield
        if states != [get() for get, _ in sources]:
            raise ValueError("what it does depends on random numbers")
    finally:
        for (_, put), state in zip(sources, states, strict=True):
            put(state)


def _random_generators() -> tuple[type, ...]:
    numpy = sys.modules.get("numpy")
    return (torch.Generator, random.Random, *((numpy.random.Generator, numpy.random.RandomState) if numpy else ()))


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
        return type(node if module is None else module).__name__
    return {"placeholder": "an argument", "output": "the result"}.get(node.op, f"{node.target!s}".split()[-1])


def _root(scope: dict[str, object]) -> str:
    """The package that a global scope belongs to."""
    return str(scope.get("__name__")).partition(".")[0]


def _is_library(scope: dict[str, object]) -> bool:
    return _root(scope) in _OWN or _root(scope) in sys.stdlib_module_names


def _reached(
    sources: "list[_Source]", follow: Callable[[object], Iterable[object]], steps: int
) -> Iterator[tuple[str, Module]]:
    """The modules that objects lead to within so many steps: (the source, module)."""
    seen: dict[int, object] = {}
    for _ in range(steps):
        following: list[_Source] = []
        for where, holder, value in sources:
            if id(value) in seen:
                continue
            seen[id(value)] = value
            if isinstance(value, Module):
                yield from ((where, module) for module in value.modules())
            elif not (isinstance(value, MethodType) and value.__self__ is holder and _is_own(value)):
                following += ((where, holder, item) for item in follow(value))
        sources = following


def _is_own(method: MethodType) -> bool:
    """Whether a method is of its object's class, as in ``self.act = self.exact``."""
    return getattr(type(method.__self__), method.__name__, None) is method.__func__


def _items(value: object) -> Iterable[object]:
    """What a container holds, and what a method is bound to."""
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, MethodType):
        return (value.__self__,)
    return value if isinstance(value, (list, tuple, set)) else ()


def _referents(value: object) -> Iterable[object]:
    """What an object refers to: items, attributes, closures, bound arguments, and the globals that a function loads."""
    if isinstance(value, (torch.Tensor, type, ModuleType)):
        return ()
    if isinstance(value, weakref.ref):
        return (value(),)
    if isinstance(value, FunctionType):
        names = () if _is_library(value.__globals__) else _global_loads(value.__code__)
        loaded = (value.__globals__[name] for name in names if name in value.__globals__)
        return (value.__closure__, value.__defaults__, value.__kwdefaults__, vars(value), *loaded)
    return gc.get_referents(value)


@functools.lru_cache(256)
def _loads_of_helpers(function: FunctionType) -> frozenset[str]:
    """The attributes that the functions load which a function refers to, and those that these refer to."""
    helpers = [function]
    for helper in helpers:
        found = (inspect.unwrap(x) for x in _referents(helper) if isinstance(x, FunctionType))
        helpers += [x for x in found if isinstance(x, FunctionType) and x not in helpers]
    codes = (helper.__code__ for helper in helpers[1:] if not _is_library(helper.__globals__))
    return frozenset(name for code in codes for name in _named_attributes(code))


def _named_attributes(code: CodeType) -> Iterator[str]:
    """The attributes that code loads by an instruction."""
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _named_attributes(constant)


def _global_loads(code: CodeType) -> set[str]:
    names = {this.argval for this in dis.get_instructions(code) if this.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return names.union(*(_global_loads(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


def _unseen(code: CodeType, scope: dict[str, object]) -> str | None:
    """What code may decide by without a trace noticing."""
    instructions = list(dis.get_instructions(code))
    for before, this in itertools.pairwise(instructions):
        if this.opname in _CATCHES:
            return "an exception that it catches"
        if this.opname == "LOAD_GLOBAL" and isinstance(scope.get(this.argval), _random_generators()):
            return "random numbers"
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
