"""The contract once more for the kernels that a C++ compiler made, every CPU tensor beside a page nobody may touch.

All that torch allocates goes through the allocator of fence.cpp: inputs, outputs, workspaces. A view's gaps and what
kernels allocate by themselves (stack, std::vector) are not fenced.
"""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def fence(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The allocator of fence.cpp, compiled."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if sys.platform != "linux" or compiler is None:
        pytest.skip("needs Linux and a C++ compiler")
    built = tmp_path_factory.mktemp("fence") / "fence.so"
    command = [*compiler.split(), "-std=c++20", "-O2", "-shared", "-fPIC", str(TESTS / "fence.cpp"), "-o", str(built)]
    subprocess.run(command, check=True)
    return built


def behind(fence: Path, side: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, where a fault ends only that, with fences on one side of every CPU tensor."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment |= {"LD_PRELOAD": str(fence), "DLOPS_FENCE": side, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-u", *command],
        env=environment,
        cwd=TESTS.parent,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.mark.parametrize("side", ["before", "after"])
def test_contract_of_compiled_kernels_behind_fences(fence: Path, side: str) -> None:
    which = "(cpu or cuda) and (test_error_ratio and float32-normal or test_layouts) or test_random_calls"
    which += " or test_wide_rows and normal and (20000 or 65536)"  # of aligned rows, more than a block holds
    files = ("tests/test_contract.py", "tests/test_fuzz.py", "tests/test_cuda.py")
    done = behind(fence, side, "-m", "pytest", "-v", "-p", "no:cacheprovider", *files, "-k", which)
    assert done.returncode == 0, done.stdout[-6000:]


TOUCH = """
import ctypes, torch
x = torch.empty(5)
print(x.tolist())
ctypes.memmove(x.data_ptr() + 4 * {element}, bytes(4), 4)
print("touched")
"""
ALLOCATE = """
import ctypes, torch
torch_cpu = ctypes.CDLL(torch.__path__[0] + "/lib/libtorch_cpu.so")
five, one, tensor, data = ctypes.c_int64(5), ctypes.c_int64(1), ctypes.c_void_p(), ctypes.c_void_p()
torch_cpu.aoti_torch_empty_strided(
    one, ctypes.byref(five), ctypes.byref(one), torch_cpu.aoti_torch_dtype_float32(), 0, 0, ctypes.byref(tensor))
torch_cpu.aoti_torch_get_data_ptr(tensor, ctypes.byref(data))
print(list((ctypes.c_float * 5).from_address(data.value)))
"""


@pytest.mark.parametrize(
    ("side", "element", "fault"),
    [("before", 0, False), ("before", -1, True), ("after", 4, False), ("after", 5, True)],
)
def test_fences_stop_an_access(fence: Path, side: str, element: int, fault: bool) -> None:
    done = behind(fence, side, "-c", TOUCH.format(element=element))
    assert str([float("nan")] * 5) in done.stdout
    assert (done.returncode == -signal.SIGSEGV) == fault == ("touched" not in done.stdout), done.stdout


def test_what_cpp_allocates_is_poisoned(fence: Path) -> None:
    done = behind(fence, "after", "-c", ALLOCATE)
    assert str([float("nan")] * 5) in done.stdout, done.stdout
