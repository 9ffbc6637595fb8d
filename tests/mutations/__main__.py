"""Whether the tests notice: breaks kernels on purpose, one change at a time, and expects tests to fail.

    python tests/mutations [WORDS]      the mutations of all kernels, or of those whose heading contains every word

The tables beside this file name, for every kernel, the tests that ought to notice, and the mutations:

    [csrc/cuda/norm.cu forward_kernel]
    test_cuda.py -k norm_forward

    the bias is subtracted
    - * w.get(i) + b.get(i);
    + * w.get(i) - b.get(i);

A heading such as [csrc/core/device.h csrc/cuda/norm.cu] is for a header, as that source includes it.

A mutation replaces a snippet, which must occur exactly once in the file whatever its white space, in a copy of the
package, and builds that with the commands that built the original. The copy must pass before it is mutated. Tests on a
line that begins with "fenced" run with the allocator of fence.cpp, as tests/test_fence.py runs them.
"""

import functools
import importlib
import json
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

HERE = Path(__file__).resolve().parent
TESTS, ROOT = HERE.parent, HERE.parents[1]
BUILD = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
SUFFIX = str(sysconfig.get_config_var("EXT_SUFFIX"))
WORKERS = int(os.environ.get("WORKERS", "2"))
PATIENCE = 10, 60  # a run hangs when it takes so many times what it takes unmutated, and so many seconds


# ---- the tables ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mutation:
    what: str
    old: str
    new: str

    def apply(self, text: str) -> str:
        """The text with the snippet replaced.

        Raises:
            LookupError: the snippet does not occur exactly once.
        """
        pattern = r"\s+".join(map(re.escape, self.old.split()))
        if (found := len(re.findall(pattern, text))) != 1:
            raise LookupError(f"occurs {found} times, not once: {self.old}")
        return re.sub(pattern, lambda _: self.new, text)


@dataclass(frozen=True)
class Kernel:
    """A kernel, or a file of device functions: its quick tests, as pytest's arguments for each run, and mutations.

    Args:
        file: what is mutated.
        name: the kernel in it; of a header the source file that is compiled with it.
    """

    file: str
    name: str
    runs: list[str]
    mutations: list[Mutation]

    @property
    def source(self) -> str:
        return self.name if self.file.endswith(".h") else self.file

    def __str__(self) -> str:
        return f"{self.file} {self.name}".strip()


def tables() -> Iterator[Kernel]:
    """What all tables list."""
    for table in sorted(HERE.glob("*.txt")):
        for section in re.split(r"^(?=\[)", table.read_text(), flags=re.MULTILINE)[1:]:
            head, *entries = re.split(r"\n{2,}", section.strip())
            heading, *runs = head.splitlines()
            file, _, name = heading.strip("[]").partition(" ")
            yield Kernel(file, name, runs, [_mutation(entry) for entry in entries])


def _mutation(entry: str) -> Mutation:
    what, *lines = entry.splitlines()
    old, new = ("\n".join(line[2:] for line in lines if line[0] == sign) for sign in "-+")
    return Mutation(what, old, new)


# ---- a copy to mutate ----------------------------------------------------------------------------------------------


class NoVerdict(Exception):
    """Why nothing can be said about a mutation."""


@dataclass(frozen=True)
class Verdict:
    outcome: str  # killed, survived or no verdict
    how: str  # what failed, or why there is no verdict
    seconds: float


class Copy:
    """The package in a folder as pip would install it, with the modules that were built in place."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.servers: dict[bool, subprocess.Popen[str]] = {}  # by whether they are fenced
        for source, target in (("dlops", "dlops"), ("kernels", "dlops/kernels")):
            shutil.copytree(ROOT / source, folder / target, ignore=shutil.ignore_patterns("__pycache__"))

    def test(self, kernel: Kernel, mutation: Mutation | None = None, limit: float | None = None) -> Verdict:
        """Runs the kernel's tests until one fails, for at most limit seconds each time."""
        start = time.monotonic()
        outcome, how = "survived", ""
        try:
            if mutation:
                self.mutate(kernel, mutation)
            for run in kernel.runs:
                if failed := self.failure(run, limit):
                    outcome, how = "killed", failed
                    break
        except NoVerdict as error:
            outcome, how = "no verdict", str(error)
        self.restore(kernel.source)
        return Verdict(outcome, how, time.monotonic() - start)

    def mutate(self, kernel: Kernel, mutation: Mutation) -> None:
        file = ROOT / kernel.file
        try:
            text = mutation.apply(file.read_text())
        except LookupError as error:
            raise NoVerdict(str(error)) from None
        original, target = self.product(kernel.source)
        if file.suffix == ".py":
            target.write_text(text)
            return
        headers, built = self.folder / "csrc", self.folder / "mutated.o"
        mutated = headers / file.relative_to(ROOT / "csrc")
        mutated.parent.mkdir(parents=True, exist_ok=True)
        mutated.write_text(text)
        (compiler, *compilation), link = commands(ROOT / kernel.source, original.name)
        was = compilation[compilation.index("-o") + 1]
        instead = {str(file): mutated, was: built, f"{was}.d": f"{built}.d", link[-1]: target}
        for command in ([compiler, f"-I{headers}", *compilation], link):
            done = subprocess.run([instead.get(word, word) for word in command], capture_output=True, text=True)
            if done.returncode:
                raise NoVerdict(f"does not compile: {done.stderr.strip()}")

    def restore(self, file: str) -> None:
        shutil.copy(*self.product(file))

    def product(self, file: str) -> tuple[Path, Path]:
        """What Python loads of a kernel file: the original, and the copy's."""
        if file.endswith(".py"):
            return ROOT / file, self.folder / "dlops" / file
        module = ("_simt" if file.endswith(".cu") else "_C") + SUFFIX
        return ROOT / "dlops" / module, self.folder / "dlops" / module

    def failure(self, run: str, limit: float | None) -> str | None:
        """The first test that fails, or the signal that ends the process, or None.

        Raises:
            NoVerdict: no test failed, but they did not all run, or not in time.
        """
        words = shlex.split(run.removeprefix("fenced "))
        selection = [str(TESTS / word) if word.endswith(".py") else word for word in words]
        said = self.folder / "said.txt"
        server = self.server(run.startswith("fenced "))
        assert server.stdin and server.stdout
        json.dump([str(said), *selection, "-xq", "--tb=no", "-p", "no:cacheprovider"], server.stdin)
        server.stdin.write("\n")
        server.stdin.flush()
        if not select.select([server.stdout], [], [], limit)[0]:
            self.stop()
            raise NoVerdict(f"hangs: {limit:.0f} s")
        code = int(server.stdout.readline())
        if code < 0:
            return signal.Signals(-code).name
        if code == 1:
            return re.findall(r"^(?:FAILED|ERROR) \S*::(\S+)", said.read_text(), re.MULTILINE)[0]
        if code:
            raise NoVerdict(f"pytest says:\n{said.read_text().strip()[-2000:]}")
        return None

    def server(self, fenced: bool) -> subprocess.Popen[str]:
        """A running server.py, which imports the copy."""
        if fenced not in self.servers:
            changes = {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
            changes |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
            if fenced:
                changes |= {"LD_PRELOAD": str(self.fence()), "DLOPS_FENCE": "after"}
            self.servers[fenced] = subprocess.Popen(
                [sys.executable, str(HERE / "server.py")],
                cwd=self.folder,
                env=os.environ | changes,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        return self.servers[fenced]

    def stop(self) -> None:
        """Ends the servers, and what runs in them."""
        for server in self.servers.values():
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
        self.servers.clear()

    def fence(self) -> Path:
        """The allocator of fence.cpp, compiled."""
        built = self.folder / "fence.so"
        if not built.exists():
            compiler = shlex.split(os.environ.get("CXX", "c++"))
            flags = ["-std=c++20", "-O2", "-shared", "-fPIC"]
            subprocess.run([*compiler, *flags, str(TESTS / "fence.cpp"), "-o", str(built)], check=True)
        return built


@functools.cache
def commands(source: Path, module: str) -> tuple[list[str], list[str]]:
    """The commands that compile a source, for the CPU's own instruction set, and link the module."""
    ninja = [found] if (found := shutil.which("ninja")) else [sys.executable, "-m", "ninja"]
    question = [*ninja, "-C", str(BUILD), "-t", "commands", str(BUILD / module)]
    lines = subprocess.run(question, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    *compilations, link = map(shlex.split, lines)
    wanted = {str(source)} | ({f"-DDLOPS_ISA={isa()}"} if module.startswith("_C") else set())
    return next(c for c in compilations if wanted <= set(c)), link


@functools.cache
def isa() -> str:
    importlib.import_module("torch")
    return importlib.import_module("dlops._C").cpu_features()["isa"]


# ---- verdicts ------------------------------------------------------------------------------------------------------


def judge(kernel: Kernel) -> Iterator[tuple[Mutation, Verdict]]:
    """A verdict on each of the kernel's mutations."""
    with tempfile.TemporaryDirectory(prefix="dlops-mutate-") as folder:
        copy = Copy(Path(folder))
        try:
            whole = copy.test(kernel)
            for mutation in kernel.mutations:
                if whole.outcome == "survived":
                    yield mutation, copy.test(kernel, mutation, PATIENCE[0] * whole.seconds + PATIENCE[1])
                else:
                    yield mutation, Verdict("no verdict", f"unmutated: {whole.how}", 0)
        finally:
            copy.stop()


def main() -> int:
    console = Console(markup=False, width=None if sys.stdout.isatty() else 200)
    kernels = [kernel for kernel in tables() if all(word in str(kernel) for word in sys.argv[1:])]
    total = sum(len(kernel.mutations) for kernel in kernels)
    with Progress(console=console, transient=True) as progress, ThreadPoolExecutor(WORKERS) as pool:
        task = progress.add_task("mutations", total=total)

        def rows(kernel: Kernel) -> list[tuple[str, ...]]:
            found = []
            for mutation, verdict in judge(kernel):
                found.append((str(kernel), mutation.what, verdict.outcome, verdict.how, f"{verdict.seconds:.0f}"))
                progress.advance(task)
                if verdict.outcome != "killed" or not console.is_terminal:
                    console.print(*found[-1], sep=": ", style="red")
            return found

        found = [row for some in pool.map(rows, kernels) for row in some]
    table = Table("kernel", "mutation", "verdict", "by", "seconds")
    for row in found:
        table.add_row(*row, style="" if row[2] == "killed" else "red")
    console.print(table)
    killed = sum(row[2] == "killed" for row in found)
    console.print(f"{killed} of {total} mutations of {len(kernels)} kernels killed")
    return int(killed < total or not total)


if __name__ == "__main__":
    sys.exit(main())
