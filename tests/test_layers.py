"""Imports point down: models, nn, functional, ops, {_op, backend}, kernels."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each layer may import itself and what comes after it.
LAYERS = [
    "models",
    "patch",
    "_pairs",
    "_trace",
    "_code",
    "compat",
    "nn",
    "functional",
    "testing",
    "ops",
    "_op",
    "backend",
]


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            for alias in node.names:
                yield f"{node.module}.{alias.name}"


@pytest.mark.parametrize("path", sorted((ROOT / "dlops").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_dlops_imports_point_down(path: Path) -> None:
    layer = path.relative_to(ROOT / "dlops").parts[0].removesuffix(".py")
    if layer not in LAYERS:
        assert layer in {"__init__", "__main__", "_version"}
        return
    for name in imports(path):
        if name.startswith("dlops."):
            target = name.split(".")[1]
            assert LAYERS.index(layer) <= LAYERS.index(target), f"{path} imports {name}"
        if layer != "backend":
            assert "environ" not in path.read_text(), "only backend.py reads the environment"
        assert name.split(".")[0] not in {"tests", "bench"}


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda p: p.name)
def test_kernels_import_only_torch_and_triton(path: Path) -> None:
    standard = {"math", "functools", "itertools", "dataclasses", "collections", "typing", "enum", "__future__"}
    assert {name.split(".")[0] for name in imports(path)} <= {"torch", "triton"} | standard
