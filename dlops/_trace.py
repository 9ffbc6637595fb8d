"""Traces of a module's forward, by torch.fx, that other calls could not contradict."""

import contextlib
import copy
import dis
import gc
import inspect
import itertools
import pickle
import random
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any, NoReturn

import torch
from torch import fx
from torch.fx.proxy import Attribute, TraceError
from torch.nn import Module

from dlops._code import OWN, is_library, root

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
_AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")


def traces(module: Module) -> Iterator[fx.Graph]:
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


def called(caller: Module, node: object) -> Module | None:
    """The module that a node of ``caller``'s graph calls."""
    if isinstance(node, fx.Node) and node.op == "call_module":
        return caller.get_submodule(str(node.target))
    return None


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
            root(frame.f_globals) in sys.stdlib_module_names or frame.f_code.co_name == "__instancecheck__"
        ):
            frame = frame.f_back
        if root(frame.f_globals) not in OWN:
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
        if event == "call" and not is_library(frame.f_globals):
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
        if isinstance(called(self.root, node), torch.nn.Linear):
            self._proxies.append(weakref.ref(proxy))
        return proxy

    def _mark_kept(self) -> None:
        """Mark the linears whose output the forward left somewhere, as in ``self.hidden = x``."""
        if any(proxy() is not None for proxy in self._proxies):
            gc.collect()
        for proxy in self._proxies:
            if (alive := proxy()) is not None:
                alive.node.meta["kept"] = True


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
