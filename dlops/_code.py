"""What code and objects lead to: the attributes that code loads, and the modules that an object refers to."""

import dis
import functools
import gc
import inspect
import itertools
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from types import CodeType, FunctionType, MethodType, ModuleType

import torch
from torch.nn import Module

_HARMLESS = (object, Module, torch.nn.Sequential, torch.nn.ModuleList, torch.nn.ModuleDict)
# What leads from a module to any other below it.
_REACHES = {"_modules", "apply", "children", "modules", "named_children", "named_modules", "get_submodule", "__dict__"}
OWN = ("torch", "dlops")
_TAKES_FROM_SELF = {  # the instructions after one that loads self
    *("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "STORE_ATTR", "DELETE_ATTR", "COPY", "DUP_TOP"),
    *("CONVERT_VALUE", "FORMAT_SIMPLE", "FORMAT_VALUE"),
}
_INITIALIZERS = ("__init__", "_init_weights", "init_weights", "reset_parameters")  # handle children, never run them
Source = tuple[str, Module | None, object]  # the words for it, the module whose attribute it is, the object


class Loads:
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


def root(scope: dict[str, object]) -> str:
    """The package that a global scope belongs to."""
    return str(scope.get("__name__")).partition(".")[0]


def is_library(scope: dict[str, object]) -> bool:
    return root(scope) in OWN or root(scope) in sys.stdlib_module_names


def reached(
    sources: "list[Source]", follow: Callable[[object], Iterable[object]], steps: int
) -> Iterator[tuple[str, Module]]:
    """The modules that objects lead to within so many steps: (the source, module)."""
    seen: dict[int, object] = {}
    for _ in range(steps):
        following: list[Source] = []
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


def items(value: object) -> Iterable[object]:
    """What a container holds, and what a method is bound to."""
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, MethodType):
        return (value.__self__,)
    return value if isinstance(value, (list, tuple, set)) else ()


def referents(value: object) -> Iterable[object]:
    """What an object refers to: items, attributes, closures, bound arguments, and the globals that a function loads."""
    if isinstance(value, (torch.Tensor, type, ModuleType)):
        return ()
    if isinstance(value, weakref.ref):
        return (value(),)
    if isinstance(value, FunctionType):
        names = () if is_library(value.__globals__) else _global_loads(value.__code__)
        loaded = (value.__globals__[name] for name in names if name in value.__globals__)
        return (value.__closure__, value.__defaults__, value.__kwdefaults__, vars(value), *loaded)
    return gc.get_referents(value)


@functools.lru_cache(256)
def _loads_of_helpers(function: FunctionType) -> frozenset[str]:
    """The attributes that the functions load which a function refers to, and those that these refer to."""
    helpers = [function]
    for helper in helpers:
        found = (inspect.unwrap(x) for x in referents(helper) if isinstance(x, FunctionType))
        helpers += [x for x in found if isinstance(x, FunctionType) and x not in helpers]
    codes = (helper.__code__ for helper in helpers[1:] if not is_library(helper.__globals__))
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
