"""What a benchmark case is, how a family's file declares one, and how the runner finds them all."""

import fnmatch
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, ...]
DIRECTIONS = ("forward", "forward+backward")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# The dtype measured by default on each class of device, then the others of --all.
DEVICE_DTYPES = {"cpu": ("float32", "bfloat16", "float16"), "cuda": ("bfloat16", "float16", "float32")}


class Unavailable(Exception):
    """Raised by a builder whose requirements are not installed: the case is skipped, with this reason."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A case on one device, in one dtype and shape.

    Args:
        dlops, eager: what is compared, called with ``args``: functions, or modules with the same parameters.
        args: the inputs. Gradients are taken with respect to a function's floating-point tensors, or a module's
            parameters.
        bytes: the fewest bytes that forward, and forward with backward, can move.
        flops: floating-point operations of the same two.
        peers: other libraries' implementations, by name, taking the same arguments.
        compile: whether torch.compile takes part; it would unroll a loop over a thousand steps for many minutes.
        note: called after the timing; what it returns is printed with the results.
    """

    dlops: Callable[..., Any]
    eager: Callable[..., Any]
    args: tuple[Tensor, ...]
    bytes: tuple[float, float]
    flops: tuple[float, float]
    peers: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    compile: bool = True
    note: Callable[[], str] | None = None


@dataclass(frozen=True)
class Case:
    """A named builder of problems and the shapes it is measured on, by device type.

    Args:
        shapes: the representative ones.
        more: those that only ``--all`` adds.
        small: a shape whose time is the host's, reported apart.
        directions: those of ``DIRECTIONS`` that it has.
    """

    name: str
    family: str
    build: Callable[..., Problem]
    shapes: Mapping[str, Sequence[Shape]]
    more: Mapping[str, Sequence[Shape]]
    small: Shape | None
    label: str
    directions: tuple[str, ...]

    def problem(self, shape: Shape, device: str, dtype: str) -> Problem:
        torch.manual_seed(0)
        return self.build(torch.device(device), DTYPES[dtype], *shape)

    def describe(self, shape: Shape) -> str:
        return self.label.format(*shape) if self.label else "x".join(map(str, shape))


@dataclass(frozen=True)
class Job:
    """One case to measure: yields a row per direction."""

    case: Case
    shape: Shape
    dtype: str
    device: str
    small: bool = False

    def __str__(self) -> str:
        return f"{self.case.name} {self.case.describe(self.shape)} {self.dtype}"

    def key(self, direction: str) -> tuple[str, ...]:
        """What names the row of one direction on a given machine."""
        return self.case.name, self.case.describe(self.shape), self.dtype, self.device, direction


_cases: dict[str, Case] = {}


def case(
    *,
    cpu: Sequence[Shape] = (),
    cuda: Sequence[Shape] = (),
    more_cpu: Sequence[Shape] = (),
    more_cuda: Sequence[Shape] = (),
    small: Shape | None = None,
    label: str = "",
    name: str = "",
    directions: tuple[str, ...] = DIRECTIONS,
) -> Callable[[Callable[..., Problem]], Callable[..., Problem]]:
    """Declare ``build(device, dtype, *shape) -> Problem`` as a case, named after the function.

    Args:
        cpu, cuda: representative shapes per device type; more_cpu, more_cuda: those that ``--all`` adds.
        small, directions: see :class:`Case`.
        label: how a shape reads, such as ``"{}x{}->{}"``; sizes joined by ``x`` by default.
        name: another name than the function's.
    """

    def register(build: Callable[..., Problem]) -> Callable[..., Problem]:
        key = name or build.__name__
        family = build.__module__.rpartition(".")[2]
        if key in _cases:
            raise ValueError(f"bench/{family}.py: there is already a case {key!r}, in bench/{_cases[key].family}.py")
        shapes, more = {"cpu": cpu, "cuda": cuda}, {"cpu": more_cpu, "cuda": more_cuda}
        _cases[key] = Case(key, family, build, shapes, more, small, label, directions)
        return build

    return register


def discover() -> dict[str, Case]:
    """Every case of every module in bench, by name."""
    package = importlib.import_module("bench")
    for module in pkgutil.iter_modules(package.__path__):
        if not module.name.startswith(("_", "test_", "conftest")):
            importlib.import_module(f"bench.{module.name}")
    return dict(sorted(_cases.items(), key=lambda item: (item[1].family, item[0])))


def select(names: Sequence[str]) -> list[Case]:
    """The cases that ``names`` select: a case's, a family's, or a pattern such as ``"linear_*"``; all without names.

    Raises:
        ValueError: a name that selects nothing.
    """
    cases = discover()
    for name in names:
        if not any(_selects(name, item) for item in cases.values()):
            raise ValueError(f"no case {name!r}; there are: {', '.join(cases)}")
    return [item for item in cases.values() if not names or any(_selects(name, item) for name in names)]


def _selects(name: str, item: Case) -> bool:
    return fnmatch.fnmatch(item.name, name) or item.family == name


def jobs(cases: Sequence[Case], device: str, dtypes: Sequence[str], everything: bool) -> Iterator[Job]:
    """The jobs of ``cases`` on ``device``: representative shapes, with ``everything`` the others too."""
    for item in cases:
        shapes = [*item.shapes[device], *(item.more[device] if everything else ())]
        for dtype in dtypes:
            yield from (Job(item, shape, dtype, device) for shape in shapes)
            if item.small is not None:
                yield Job(item, item.small, dtype, device, small=True)


def importable(path: str) -> Any:
    """The object that ``"module:name"`` names, or ``None`` where the module cannot be imported: for optional peers."""
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name, None)
    except (ImportError, OSError, RuntimeError):
        return None
