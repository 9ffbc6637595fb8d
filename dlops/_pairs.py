"""Which Linear -> activation pairs of a model may be fused, proved by tracing what calls them with torch.fx.

A pair is proven when every call of the activation takes the output of such a linear, the linear is called once by one
module and nothing else takes its output. The calls are read off the traced forward of the modules that hold the two, in
training and evaluation, with and without gradients, and with optional arguments given and left out; a forward that
decides by what a trace does not see proves nothing. No other module above them may reach past that forward: its
code does not name them, or its own trace does not call them. And nothing that a forward uses besides the submodules
(an object, a closure, a global) may lead to them.
"""

import contextlib
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator

from torch import fx
from torch.nn import Module

from dlops._code import Loads, Source, is_library, items, reached, referents
from dlops._trace import called, traces

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
_REGISTERED = vars(Module()).keys()
_Calls = dict[Module, list[tuple[fx.Graph, fx.Node]]]
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
        self._loaded: dict[type, Loads] = {}
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
                others = [u for u in node.users if called(callers[0], u) is not activation]
                if others:
                    raise Unproven(f"the linear's output is also used by {_describe(callers[0], others[0])}")
        return linears

    def functions(self) -> Iterator[tuple[Module, str]]:
        """Linears whose output goes to an activation function: (linear, the function's name)."""
        for caller in self._linear_callers:
            graph = None
            with contextlib.suppress(Exception):
                graph = next(traces(caller))
            for node in graph.nodes if graph else ():
                name = getattr(node.target, "__name__", node.target)
                if node.op in ("call_function", "call_method") and name in _NAMES and node.args:
                    linear = called(caller, node.args[0])
                    if linear is not None and self.is_linear(linear):
                        yield linear, name

    def _producer(self, caller: Module, node: fx.Node) -> Module:
        if len(node.args) != 1 or node.kwargs:
            raise Unproven("the activation is not called with exactly one argument")
        source = node.args[0]
        linear = called(caller, source)
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
                for graph in traces(caller):
                    for node in graph.nodes:
                        if (callee := called(caller, node)) is not None:
                            calls[callee].append((graph, node))
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

    def _loads(self, cls: type) -> "Loads":
        if cls not in self._loaded:
            self._loaded[cls] = Loads(cls)
        return self._loaded[cls]

    def _stashes(self) -> Iterator[tuple[str, Module]]:
        """The modules that the model holds elsewhere than among the submodules of its modules: (where, module)."""
        classes = {type(holder): self._loads(type(holder)) for holder in self.names}
        used, grown = set(), {"forward"}  # the names that the forwards use, and the methods they lead to
        while grown - used:
            used |= grown
            grown = {name for loads in classes.values() for name in loads.used_by(used)}
        containers: list[Source] = []
        sources: list[Source] = [
            (f"{cls.__name__}.{name}", None, function)
            for cls, loads in classes.items()
            for name, function in loads.functions.items()
            if name in used and not is_library(function.__globals__)
        ]
        for holder in self.names:
            cls = type(holder)
            for name, value in vars(holder).items():
                if name not in _REGISTERED:
                    in_use = name in used or classes[cls].reaches
                    (sources if in_use else containers).append((f"{cls.__name__}.{name}", holder, value))
        yield from reached(containers, items, 4)
        yield from reached(sources, referents, 9)


def _has_forward(module: Module) -> bool:
    return type(module).forward is not Module.forward or "forward" in vars(module)


def _describe(caller: Module, node: object) -> str:
    module = called(caller, node)
    if module is not None or not isinstance(node, fx.Node):
        return type(node if module is None else module).__name__
    return {"placeholder": "an argument", "output": "the result"}.get(node.op, f"{node.target!s}".split()[-1])
