"""Fixtures and options. Without a GPU Triton's kernels run in its interpreter, which must be chosen before import."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

from dlops import backend
from dlops.testing import Ratio, numerics_page
from dlops.testing.guard import guard
from dlops.testing.interpreter import quick_interpreter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def device() -> str:
    """The device whose kernels are tested: the GPU where there is one."""
    return DEVICE


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def guarded() -> Iterator[None]:
    """Every access of every interpreted Triton kernel is checked, in every test."""
    with ExitStack() as stack:
        if backend.missing("triton") is None and backend.triton_interpreted():
            stack.enter_context(guard())
            stack.enter_context(quick_interpreter())
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--numerics", type=Path, help="write the measured error ratios to this markdown file")
    parser.addoption("--resume", type=Path, help="note in this file which tests passed, and skip those it names")


PASSED = pytest.StashKey[set[str]]()  # before this run
LEFT_OUT = pytest.StashKey[bool]()  # some of them were, in this process


class Passed:
    """Notes the tests that passed. A run that finds none left to do of those that were asked for has succeeded."""

    def __init__(self, file: Path, before: set[str]) -> None:
        self.file, self.before = file, before
        self.left_out = False  # whether a test was, because it had passed
        file.parent.mkdir(parents=True, exist_ok=True)

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """A worker that takes a dead one's place must collect what that one did, whatever has passed since."""
        node.workerinput["passed"] = sorted(self.before)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.left_out |= getattr(node, "workeroutput", {}).get("left_out", False)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.left_out |= session.config.stash.get(LEFT_OUT, False)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            with self.file.open("a") as notes:
                notes.write(f"{report.nodeid}\n")

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self.left_out:
            session.exitstatus = pytest.ExitCode.OK


def pytest_configure(config: pytest.Config) -> None:
    if file := config.getoption("--resume"):
        if (worker := getattr(config, "workerinput", None)) is not None:
            config.stash[PASSED] = set(worker["passed"])
        else:
            config.stash[PASSED] = set(file.read_text().splitlines()) if file.exists() else set()
            config.pluginmanager.register(Passed(file, config.stash[PASSED]))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """After -k and the like."""
    if passed := [item for item in items if item.nodeid in config.stash.get(PASSED, set())]:
        config.hook.pytest_deselected(items=passed)
        items[:] = [item for item in items if item.nodeid not in config.stash[PASSED]]
        config.stash[LEFT_OUT] = True
        if (output := getattr(config, "workeroutput", None)) is not None:
            output["left_out"] = True


@pytest.fixture
def record_ratios(request: pytest.FixtureRequest) -> Callable[[list[Ratio]], None]:
    """Collects a test's error ratios; with ``--numerics FILE`` the largest of each kind are written there."""

    def record(found: list[Ratio]) -> None:
        for r in found:
            dtype = str(r.dtype).removeprefix("torch.")
            request.node.user_properties.append(("ratio", (r.op, r.what, dtype, r.backend, r.largest, r.rms)))

    return record


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if page := config.getoption("--numerics"):
        reports = terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
        found = [value for report in reports for key, value in report.user_properties if key == "ratio"]
        ratios = [Ratio(op, what, getattr(torch, dtype), *rest) for op, what, dtype, *rest in found]
        page.write_text(numerics_page(ratios))
