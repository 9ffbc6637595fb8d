"""What `make gpu` rests on: a run with --resume goes on where the last one stopped."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

TESTS = """
import os

def test_one():
    pass

def test_two():
    assert "GOOD" in os.environ
"""


def test_a_resumed_run_leaves_out_what_has_passed(tmp_path: Path) -> None:
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "test_some.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--resume", "notes/passed.txt"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    for good, expected in ({}, "1 failed, 1 passed"), ({"GOOD": "1"}, "1 passed, 1 deselected"), ({}, "2 deselected"):
        done = subprocess.run(command, cwd=tmp_path, env=environment | good, capture_output=True, text=True)
        assert f" {expected} in" in done.stdout and done.returncode == ("failed" in expected), done.stdout
