"""Compiles every kernel in every configuration for every chip, in parallel, and collects what the gates say.

What is compiled only where ``full`` asks for it, since something as costly is compiled anyway: the third dtype, the
cheaper activations, rms_norm (layer_norm's kernels do all that it does, and more), fewer outputs. Results are kept in
build/static by a hash of all that they depend on.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

from bench.static import nvcc
from bench.static.chip import CHIPS, Chip
from bench.static.gate import Facts, Launch

CACHE = nvcc.ROOT / "build" / "static"
Say = Callable[[str, int, int], None]  # what is done, how many, of how many


@dataclass
class Report:
    """What was found.

    Args:
        facts: a row each.
        unchecked: what could not be compiled here, and why.
        errors: what should have been, and was not.
        nvcc_seconds: that nvcc took for all files and chips, one after the other.
    """

    facts: list[Facts] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    nvcc_seconds: float = 0.0

    def failures(self) -> list[str]:
        gates = [f"{f.kernel} {f.config} {f.chip}: {failure}" for f in self.facts for failure in f.failures()]
        return [*self.errors, *gates]


class Task(NamedTuple):
    """What a process does at a time: ``work(*args)``, whose result is kept under ``key``.

    Args:
        file, kernels: by whose names it can be selected.
    """

    file: str
    kernels: frozenset[str]
    arch: int
    key: str
    work: Callable[..., list[Facts]]
    args: tuple[Any, ...]

    def __str__(self) -> str:
        return f"{'/'.join(self.kernels) if len(self.kernels) == 1 else self.file} for sm_{self.arch}"

    @property
    def path(self) -> Path:
        return CACHE / f"{hashlib.sha256(self.key.encode()).hexdigest()}.json"


def check(names: Sequence[str], full: bool, say: Say, chips: Collection[int] = tuple(CHIPS)) -> Report:
    """Compile and gate for ``chips`` the kernels that ``names`` select: patterns of kernels' or their files' names; all
    without.

    Raises:
        ValueError: a name that selects nothing.
    """
    report = Report()
    try:
        with _workers() as pool:
            tasks = [*_cuda_tasks(report), *_triton_tasks(pool, full, report)]
            for name in names:
                if not any(_selects(name, task.file, *task.kernels) for task in tasks):
                    raise ValueError("; ".join([f"no kernel or file is called {name}", *report.unchecked]))
            tasks = [task for task in tasks if task.arch in chips]
            if names:
                tasks = [task for task in tasks if any(_selects(name, task.file, *task.kernels) for name in names)]
            for done, (task, facts, seconds) in enumerate(_run(pool, tasks, report), 1):
                say(str(task), done, len(tasks))
                report.facts += [f for f in facts if not names or any(_selects(n, task.file, f.kernel) for n in names)]
                report.nvcc_seconds += seconds if task.work is nvcc.compiled else 0.0
    except BrokenProcessPool:
        report.errors.append("a process died, perhaps for want of memory: MAX_JOBS=1 takes less; what it left is kept")
    report.facts.sort(key=lambda f: (f.kernel, f.config, f.arch))
    return report


def _selects(name: str, *words: str) -> bool:
    return any(fnmatch(word, name) for word in words)


def _source(*names: str) -> str:
    return "".join(Path(__file__).with_name(f"{name}.py").read_text() for name in names)


def _cuda_tasks(report: Report) -> list[Task]:
    if reason := nvcc.unavailable():
        report.unchecked.append(f"csrc/cuda is not checked: that needs {reason}")
        return []
    tools = _source("chip", "code", "gate", "nvcc")
    return [
        Task(s.stem, nvcc.kernels(s), chip.arch, tools + nvcc.key(s, chip), nvcc.compiled, (s, chip))
        for s in nvcc.sources()
        for chip in CHIPS.values()
    ]


def _triton_tasks(pool: ProcessPoolExecutor, full: bool, report: Report) -> list[Task]:
    if find_spec("triton") is None:
        report.unchecked.append("kernels is not checked: that needs Triton")
        return []
    families, kernels = pool.submit(_kernels).result()
    plans = [pool.submit(_launches, family, chip, full) for family in families for chip in CHIPS.values()]
    launches = dict.fromkeys(launch for plan in plans for launch in plan.result())
    idle = kernels - {launch.kernel for launch in launches}
    report.errors += [f"{kernel}: the sweep() of no module of kernels launches it" for kernel in sorted(idle)]
    tools = _source("chip", "code", "gate", "jit")
    return [
        Task(x.module.rpartition(".")[2], frozenset([x.kernel]), x.arch, tools + repr(x), _compiled, (x,))
        for x in launches
    ]


def _run(pool: ProcessPoolExecutor, tasks: Sequence[Task], report: Report) -> Iterator[tuple[Task, list[Facts], float]]:
    """Each task when it is done, its result, and how long that took, in this run or when it was kept."""
    CACHE.mkdir(parents=True, exist_ok=True)
    futures: dict[Future[tuple[list[Facts], float]], Task] = {}
    for task in tasks:
        if kept := _kept(task.path):
            yield task, *kept
        else:
            futures[pool.submit(_timed, task.work, task.args)] = task
    for future in as_completed(futures):
        task = futures[future]
        try:
            facts, seconds = future.result()
        except BrokenProcessPool:
            raise
        except Exception as error:
            report.errors.append(f"{task}: {type(error).__name__}: {error}")
            yield task, [], 0.0
        else:
            partial = task.path.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps([facts, seconds]))
            partial.replace(task.path)  # at once: another run may read it
            yield task, facts, seconds


def _kept(path: Path) -> tuple[list[Facts], float] | None:
    """What an earlier run left there, unless it is damaged."""
    try:
        facts, seconds = json.loads(path.read_text())
        return [Facts.of(data) for data in facts], float(seconds)
    except (OSError, ValueError, TypeError, LookupError):
        return None


@contextmanager
def _workers() -> Iterator[ProcessPoolExecutor]:
    """As many processes as CPUs, in none of which Triton's kernels are interpreted."""
    interpret = os.environ.pop("TRITON_INTERPRET", None)
    jobs = int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=_begin)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        if interpret is not None:
            os.environ["TRITON_INTERPRET"] = interpret


# In a worker; bench.static.jit imports the kernels, which this process may have interpreted.


def _begin() -> None:
    """Ends this process without a word where Ctrl-C reaches it, and when the one that started it is gone."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)


def _timed(work: Callable[..., list[Facts]], args: tuple[Any, ...]) -> tuple[list[Facts], float]:
    start = perf_counter()
    return work(*args), perf_counter() - start


def _kernels() -> tuple[list[str], set[str]]:
    from bench.static import jit

    return jit.families(), jit.kernels()


def _launches(family: str, chip: Chip, full: bool) -> list[Launch]:
    from bench.static import jit

    return jit.launches(family, chip, full)


def _compiled(launch: Launch) -> list[Facts]:
    from bench.static import jit

    return [jit.compiled(launch)]
