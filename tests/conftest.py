"""Fixtures only. Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before import."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

from dlops.testing import Ratio, numerics_page

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def device() -> str:
    """The device whose kernels are tested: the GPU where there is one."""
    return DEVICE


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--numerics", type=Path, help="write the measured error ratios to this markdown file (run with -n 0)"
    )


@pytest.fixture(scope="session")
def record_ratios(pytestconfig: pytest.Config) -> Iterator[Callable[[list[Ratio]], None]]:
    """Collects error ratios; with ``--numerics FILE`` the largest of each kind are written there at the end."""
    found: list[Ratio] = []
    yield found.extend
    if page := pytestconfig.getoption("--numerics"):
        page.write_text(numerics_page(found))
