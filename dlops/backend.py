"""Which implementations exist, which one runs, and why. The only file that reads the environment."""

import contextlib
import functools
import importlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

log = logging.getLogger("dlops")

BACKENDS = ("torch", "vendor", "cpu", "triton", "cuda")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _checked(what: str, name: str | None) -> str | None:
    if name is not None and name not in BACKENDS:
        raise ValueError(
            f"{what}: got {name!r}, accepted are {', '.join(map(repr, BACKENDS))}, or None for the default"
        )
    return name


_default = _checked("DLOPS_BACKEND", os.environ.get("DLOPS_BACKEND") or None)
if (_simt := os.environ.get("DLOPS_SIMT", "")) not in ("", "0", "1"):
    raise ValueError(f"DLOPS_SIMT: got {_simt!r}, accepted are 0 and 1")
_simt_forced = _simt == "1"
_forced: ContextVar[str | None] = ContextVar("dlops_backend", default=_default)
_latest = _default  # as _forced, but of whichever context was last: for a compiler that cannot trace that
forced: Callable[[], str | None] = _forced.get
if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 14):

    def forced() -> str | None:
        return _latest if torch.compiler.is_compiling() else _forced.get()


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Run every dlops op inside the block on one backend; ``None`` restores the measured choice.

    Args:
        name: ``"torch"``, ``"vendor"``, ``"cpu"``, ``"triton"``, ``"cuda"`` or ``None``.

    The backward of what ran inside keeps the same backend, wherever it is called. An op that the backend cannot
    run raises ``RuntimeError`` with the reason; nothing falls back silently.

    Raises:
        ValueError: ``name`` is not a backend.
    """
    global _latest
    token, before = _forced.set(_checked("backend", name)), _latest
    _latest = name
    try:
        yield
    finally:
        _latest = before
        _forced.reset(token)


# ---- what is there -------------------------------------------------------------------------------------------------


@functools.cache
def triton_interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter (``TRITON_INTERPRET=1``), on CPU tensors."""
    import triton.knobs

    return bool(triton.knobs.runtime.interpret)


def _missing_cpu() -> str | None:
    try:
        importlib.import_module("dlops._C")
    except ImportError as error:
        return f"the extension dlops._C is not built ({error}); install dlops where a C++ compiler is on PATH"
    return None


def _missing_triton() -> str | None:
    try:
        interpreted = triton_interpreted()
    except ImportError as error:
        return f"triton cannot be imported ({error}); pip install triton"
    if not interpreted and not torch.cuda.is_available():
        return "no GPU, and Triton's interpreter is off; set TRITON_INTERPRET=1 to run its kernels on CPU tensors"
    return None


@functools.cache
def cuda_emulated() -> bool:
    """Whether CUDA kernels run on the host, on CPU tensors: where ``dlops._simt`` is built and there is no GPU, or by
    force (``DLOPS_SIMT=1``)."""
    if not _simt_forced and torch.cuda.is_available():
        return False
    try:
        simt = importlib.import_module("dlops._simt")
    except ImportError:
        return False
    simt.configure(threads=torch.get_num_threads())
    return True


def cuda_library() -> Any:
    """The operators of the CUDA kernels, on a GPU or emulated."""
    return torch.ops.dlops_simt if cuda_emulated() else torch.ops.dlops_cuda


def _missing_cuda() -> str | None:
    if cuda_emulated():
        return None
    if _simt_forced:
        return "DLOPS_SIMT=1, but the extension dlops._simt is not built; pip install -e . builds it"
    try:
        cuda = importlib.import_module("dlops._cuda")
    except ModuleNotFoundError:
        return "the extension dlops._cuda is not built; install dlops with nvcc and a CUDA build of torch"
    except ImportError as error:
        return f"the extension dlops._cuda is built but cannot be loaded ({error}); install dlops again with this torch"
    if not torch.cuda.is_available():
        try:
            torch.cuda.init()
        except (AssertionError, RuntimeError) as error:  # a driver that is too old is told from no driver
            return f"torch has no GPU to use: {str(error).partition('. ')[0]}"
        return "torch has no GPU to use: none is visible; see nvidia-smi and CUDA_VISIBLE_DEVICES"
    info = cuda.build_info()
    built, driver = info["cuda"], cuda.driver_version()
    if driver // 1000 < built // 1000:  # minor versions are compatible
        return (
            f"dlops._cuda was built with CUDA {_version(built)} and the driver knows CUDA {_version(driver)}; "
            "update the driver, or install dlops with an older CUDA toolkit"
        )
    major, minor = torch.cuda.get_device_capability()
    architectures = info["architectures"].split(";")
    if not any(_runs_on(architecture, major, minor) for architecture in architectures):
        return (
            f"the GPU has compute capability {major}.{minor} and dlops._cuda is built for {', '.join(architectures)}; "
            f'install dlops with TORCH_CUDA_ARCH_LIST="{major}.{minor}"'
        )
    return None


def _version(cuda: int) -> str:
    return f"{cuda // 1000}.{cuda % 1000 // 10}"


def _runs_on(architecture: str, major: int, minor: int) -> bool:
    """Whether code for ``architecture`` ("8.0", "9.0a", "12.0+PTX") runs on a GPU of capability ``major.minor``."""
    number = architecture.removesuffix("+PTX")
    built = tuple(int(part) for part in number.rstrip("af").split("."))
    if number.endswith("a"):
        return built == (major, minor)
    if architecture.endswith("+PTX") and not number.endswith("f"):
        return built <= (major, minor)
    return built[0] == major and built[1] <= minor


_MISSING: dict[str, Callable[[], str | None]] = {"cpu": _missing_cpu, "triton": _missing_triton, "cuda": _missing_cuda}


@functools.cache
def missing(name: str) -> str | None:
    """Why a backend is not available in this process, or ``None`` if it is."""
    probe = _MISSING.get(name)
    return probe() if probe else None


def backends() -> dict[str, str | None]:
    """Every backend by name, with ``None`` if it is available here, else why not and how to get it."""
    return {name: missing(name) for name in BACKENDS}


@functools.cache
def cpu_model() -> tuple[str, int]:
    """The CPU's vendor (``"AuthenticAMD"``, ``"GenuineIntel"``, ...) and family number, as CPUID says; ``("", 0)`` if
    unknown."""
    if missing("cpu") is not None:
        return "", 0
    features = importlib.import_module("dlops._C").cpu_features()
    return features["vendor"], features["family"]


# ---- which one runs ------------------------------------------------------------------------------------------------


class Dispatchable(Protocol):
    name: str
    family: str
    implementations: dict[str, "Implementation"]
    rule: Callable[..., Sequence[str]]


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op: how to load it, and what it refuses."""

    load: Callable[[], Callable[..., Any]]
    refuses: Callable[..., str | None]


@dataclass
class Decision:
    """Which backend one op call ran on, and why the others did not."""

    op: str
    backend: str
    reason: str
    refused: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.backend} ({self.reason})"]
        return "\n".join(lines + [f"    {name}: {why}" for name, why in self.refused.items()])


@dataclass(eq=False)
class Recording:
    """The decisions made inside one :func:`explain`."""

    decisions: list[Decision] = field(default_factory=list)


_recording: ContextVar[Recording | None] = ContextVar("dlops_recording", default=None)
recording = _recording.get


def select(op: Dispatchable, args: Sequence[Any]) -> Callable[..., Any]:
    """The implementation of ``op`` that runs for ``args``: the forced backend, else the first that its rule names and
    that does not refuse them."""
    name = _forced.get()
    if name is not None:
        reason = refusal(op, name, args)
        if reason is not None:
            raise RuntimeError(f"dlops.{op.name}: backend {name!r} was forced but cannot run this call: {reason}")
        note(op, name, "forced by use_backend or DLOPS_BACKEND")
        return _loaded(op, name)
    refused = {}
    for name in op.rule(*args):
        reason = refusal(op, name, args)
        if reason is None:
            break
        refused[name] = reason
        _log_once(op.name, name, reason)
    else:
        name = "torch"
    if _recording.get() is not None:
        note(op, name, _why(args), refused)
    return _loaded(op, name)


def note(op: Dispatchable, name: str, reason: str, refused: dict[str, str] | None = None) -> None:
    """For :func:`explain`: a call of ``op`` runs on backend ``name``."""
    if record := _recording.get():
        record.decisions.append(Decision(op.name, name, reason, refused or {}))


def refusal(op: Dispatchable, name: str, args: Sequence[Any]) -> str | None:
    """Why backend ``name`` cannot compute ``op`` on ``args``, or ``None`` if it can."""
    implementation = op.implementations.get(name)
    if implementation is None:
        return f"{op.name} has no {name} implementation"
    return missing(name) or implementation.refuses(*args)


@functools.cache
def _loaded(op: Dispatchable, name: str) -> Callable[..., Any]:
    return op.implementations[name].load()


@functools.cache
def _log_once(op: str, name: str, reason: str) -> None:
    log.info("%s does not run on %s: %s", op, name, reason)


def _why(args: Sequence[Any]) -> str:
    devices = {a.device.type for a in args if isinstance(a, torch.Tensor)}
    if devices == {"cpu"}:
        return "first choice of the op's rule that accepts these arguments"
    return "first choice that accepts these arguments; unmeasured here"


@dataclass(frozen=True)
class Explanation:
    """Every op call that one function call dispatched, in order."""

    decisions: tuple[Decision, ...]

    @property
    def backend(self) -> str:
        """The backend of the last op call; ``"torch"`` where torch's own eager function was called instead."""
        return self.decisions[-1].backend if self.decisions else "torch"

    def __str__(self) -> str:
        if not self.decisions:
            return "torch: torch's own eager function ran; it is the faster one here, or the only one that accepts this"
        return "\n".join(map(str, self.decisions))


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Call ``function`` (an op, a ``dlops.functional`` function, a model) and say which backend every op ran on, and
    why the others did not.

    Returns:
        An :class:`Explanation`: print it, or read ``.backend`` and ``.decisions``.
    """
    record = Recording()
    token = _recording.set(record)
    try:
        function(*args, **kwargs)
    finally:
        _recording.reset(token)
    return Explanation(tuple(record.decisions))
