"""What `make gpu` rests on: a run with --resume goes on where the last one stopped."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import os

def test_one():
    pass

def test_two():
    assert "GOOD" in os.environ
"""


CRASH = """
import os

def test_one():
    pass

def test_two():
    os.abort()

def test_three():
    pass
"""


def resume(folder: Path, tests: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    shutil.copy(Path(__file__).with_name("conftest.py"), folder)
    (folder / "test_some.py").write_text(tests)
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--resume", "notes/passed.txt"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")} | variables
    return subprocess.run([*command, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def test_a_resumed_run_leaves_out_what_has_passed(tmp_path: Path) -> None:
    for good, expected in ({}, "1 failed, 1 passed"), ({"GOOD": "1"}, "1 passed, 1 deselected"), ({}, "2 deselected"):
        done = resume(tmp_path, TESTS, **good)
        assert f" {expected} in" in done.stdout and done.returncode == ("failed" in expected), done.stdout


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_resumed_run_of_no_test_fails(tmp_path: Path, workers: str) -> None:
    pytest.importorskip("xdist")
    for word, expected in ("one", 0), ("one", 0), ("three", pytest.ExitCode.NO_TESTS_COLLECTED):
        done = resume(tmp_path, TESTS, "-k", word, "-n", workers)
        assert done.returncode == expected, done.stdout


def test_another_worker_goes_on_where_one_died(tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    done = resume(tmp_path, CRASH, "-n", "1")
    assert " 1 failed, 2 passed in" in done.stdout and done.returncode == 1, done.stdout
