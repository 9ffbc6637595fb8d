"""The tables of tests/mutations, which `make mutate` applies: every snippet is there."""

import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
KERNELS = list(runpy.run_path(str(ROOT / "tests" / "mutations" / "__main__.py"))["tables"]())


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_every_snippet_occurs_once(kernel: Any) -> None:
    text = (ROOT / kernel.file).read_text()
    for mutation in kernel.mutations:
        assert mutation.apply(text) != text
    for run in kernel.runs:
        assert all((ROOT / "tests" / word).exists() for word in run.split() if word.endswith(".py"))
