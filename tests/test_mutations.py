"""The tables of tests/mutations, which `make mutate` applies: every snippet is there, every kernel has some."""

import re
import runpy
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
KERNELS = list(runpy.run_path(str(ROOT / "tests" / "mutations" / "__main__.py"))["tables"]())
FEWEST = 5


def kernels() -> Iterator[str]:
    """Headings of all kernels, and of files that have only functions for kernels."""
    patterns = {
        "csrc/cuda/*.cu": r"__global__ void (?:__launch_bounds__\([^)]*\)\s+)?(\w+)\(",
        "csrc/cpu/*.cpp": r"(?<!>\n)^(?:void|DLOPS_BY_DTYPE)[ (](\w+)(?:, \w+\)$|\([^)]* begin, int64_t end[^)]*\) \{)",
        "kernels/*.py": r"^@triton\.jit.*\ndef (\w+_kernel)\(",
    }
    for files, pattern in patterns.items():
        for path in sorted(ROOT.glob(files)):
            file, text = str(path.relative_to(ROOT)), path.read_text()
            found = re.findall(pattern, text, re.MULTILINE)
            yield from (f"{file} {name}" for name in found)
            if not found and (path.suffix != ".py" or "@triton.jit" in text):
                yield file


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_every_snippet_occurs_once(kernel: Any) -> None:
    text = (ROOT / kernel.file).read_text()
    for mutation in kernel.mutations:
        assert mutation.apply(text) != text
    for run in kernel.runs:
        assert all((ROOT / "tests" / word).exists() for word in run.split() if word.endswith(".py"))


@pytest.fixture(scope="module")
def collected() -> list[str]:
    """The ids of all tests, collected from another folder: in the clone, its dlops/ hides what is installed."""
    command = [sys.executable, "-m", "pytest", ROOT / "tests", "--collect-only", "-q", "-p", "no:cacheprovider"]
    return subprocess.run(command, cwd=ROOT.anchor, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_every_run_selects_tests(kernel: Any, collected: list[str]) -> None:
    for run in kernel.runs:
        *files, _, selection = shlex.split(run.removeprefix("fenced "))
        tests = [test for test in collected if any(f"/{file}::" in test for file in files)]
        for word in {*re.findall(r"[^\s()]+", selection)} - {"and", "or", "not"}:
            assert any(word in test for test in tests), f"{word} is in no test's name: {run}"


@pytest.mark.parametrize("heading", kernels())
def test_every_kernel_has_mutations(heading: str) -> None:
    count = Counter({str(kernel): len(kernel.mutations) for kernel in KERNELS})[heading]
    assert count >= FEWEST, (
        f"{heading} has {count} mutations: list at least {FEWEST} under [{heading}] in tests/mutations/*.txt, "
        f"and see that `make mutate KERNEL='{heading}'` kills them all"
    )


def test_every_heading_is_a_kernel() -> None:
    """Or a header, as one of the sources includes it."""
    headers = [kernel for kernel in KERNELS if kernel.file.endswith(".h")]
    assert all((ROOT / kernel.file).exists() and (ROOT / kernel.source).exists() for kernel in headers)
    assert sorted(str(kernel) for kernel in KERNELS if kernel not in headers) == sorted(kernels())
