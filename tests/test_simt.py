"""The host SIMT runtime: what it finds in kernels that are wrong, and that it finds nothing in those that are right."""

import ctypes
import fcntl
import importlib.util
import itertools
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
FAULTS = ROOT / "tests" / "simt" / "faults.cu"
FEATURES = [FAULTS.with_name("features.cu"), FAULTS.with_name("intrinsics.cu")]  # without a fault

ADDRESS = "libasan" in os.environ.get("LD_PRELOAD", "")  # make sanitize
own_checks = pytest.mark.skipif(ADDRESS, reason="AddressSanitizer takes the place of the runtime's own checks")

pytestmark = pytest.mark.skipif(
    shutil.which("c++") is None or platform.machine() not in ("x86_64", "aarch64"),
    reason="needs a C++ compiler, and x86-64 or ARM64",
)


@pytest.fixture(scope="session")
def library() -> ctypes.CDLL:
    """The test kernels and the runtime, compiled as dlops._simt is."""
    spec = importlib.util.spec_from_file_location("dlops_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    setup: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    ninja = setup.Ninja(ROOT / "build" / ("simt-tests-address" if ADDRESS else "simt-tests"))
    ninja.folder.mkdir(parents=True, exist_ok=True)
    target = ninja.folder / "kernels.so"
    sanitizer = setup.SIMT_ADDRESS_FLAGS if ADDRESS else []
    base = [*setup.find_cxx(), *setup.SIMT_FLAGS, *setup.PATH_FLAGS, *sanitizer]
    checks = [*setup.SIMT_KERNEL_FLAGS, *([] if ADDRESS else setup.SIMT_CHECK_FLAGS)]
    objects = ninja.compile("runtime", base, sorted((ROOT / "csrc" / "simt").glob("*.cpp")))
    objects += ninja.compile("kernels", [*base, *checks], [FAULTS, *FEATURES])
    ninja.link("link", [*setup.find_cxx(), "-shared", "-pthread", *sanitizer], objects, ["-ldl"], target)
    with open(ninja.folder / "lock", "w") as lock:  # test workers share the folder
        fcntl.flock(lock, fcntl.LOCK_EX)
        ninja.run()
        found = ctypes.CDLL(str(target))
    found.run.restype = ctypes.c_char_p
    return found


@pytest.fixture
def configure(library: ctypes.CDLL) -> Iterator[Any]:
    def change(seed: int = 0, poison: int = 255, detect_races: bool = True, threads: int = 2) -> None:
        library.configure(ctypes.c_ulonglong(seed), poison, detect_races, threads)

    change()
    yield change
    change()


def run(
    library: ctypes.CDLL, name: str, *, grid: int = 1, block: int = 64, shared_bytes: int = 0, n: int = 0
) -> tuple[str, torch.Tensor]:
    """What the runtime says about a kernel, and what the kernel wrote."""
    out = torch.full((256,), -1, dtype=torch.int32)
    said = library.run(name.encode(), grid, block, shared_bytes, ctypes.c_void_p(out.data_ptr()), n)
    return (said or b"").decode(), out


def line(text: str, after: str) -> str:
    """The place of the first line with ``text`` in kernel ``after``, as messages give it."""
    lines = FAULTS.read_text().splitlines()
    start = next(i for i, found in enumerate(lines) if f"void {after}(" in found)
    return f"tests/simt/faults.cu:{next(i for i, found in enumerate(lines[start:], start + 1) if text in found)}"


THREAD = r"thread \(\d+, 0, 0\) of block \(\d, 0, 0\)"
ANY_LINE = r"(\S+, inlined at )?tests/simt/faults\.cu:\d+"

# kernel, launch, what is raced on, what the two threads do there and on which line
RACES = [
    ("race", {}, "shared array total, byte 0", ("writes", "total[0] ="), ("wrote", "total[0] =")),
    ("missing_barrier", {}, "shared array values, byte", None, None),
    ("missing_second_barrier", {}, "shared array values, byte", None, None),
    ("missing_warp_barrier", {"block": 32}, "shared array values, byte", None, None),
    ("half_warp_barrier", {"block": 32}, "shared array values, byte", None, None),
    ("blocks_race", {"grid": 3}, "global memory at 0x", ("writes", "out[thr"), ("wrote", "out[thr")),
    ("blocks_read_race", {"grid": 4, "block": 1}, "global memory at 0x", None, None),
    ("plain_and_atomic", {}, "global memory at 0x", None, None),
    ("initialised_by_one_block", {"grid": 3}, "global memory at 0x", None, None),
    ("race_on_a_byte", {"n": 0}, "shared array values, byte 0", None, None),
    ("race_on_a_byte", {"n": 1}, "shared array values, byte 1", None, None),
    ("memset_race", {}, "shared array values, byte 0", ("writes", "std::memset"), ("wrote", "std::memset")),
    ("disturbed_copy", {"n": 5}, "global memory at 0x", None, None),
    ("disturbed_copy", {"n": 6}, "shared array values, byte 4", None, None),
    ("late_copy", {"n": 0}, "shared array values, byte", ("reads", "out[64"), None),
    ("late_copy", {"n": 1}, "shared array values, byte", ("reads", "out[64"), None),
]


@own_checks
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("name", "launch", "where", "one", "other"), RACES, ids=[race[0] for race in RACES])
def test_a_race_is_found_whatever_the_order(
    library: ctypes.CDLL, configure: Any, seed: int, name: str, launch: Any, where: str, one: Any, other: Any
) -> None:
    configure(seed=seed)
    said, _ = run(library, name, **launch)
    places = [
        (r"\w+ it( atomically)?", ANY_LINE) if x is None else (f"{x[0]} it", line(x[1], name)) for x in (one, other)
    ]
    (does, at), (did, before) = places
    pattern = (
        f"kernel {name}: race on {where}.*: {THREAD} {does} at {at}, {THREAD} {did} at {before}, and nothing orders"
    )
    assert re.search(pattern, said), said
    lines = said.splitlines()
    assert len(lines) == len({re.sub(r"\(.*?\)|byte \d+|0x\w+", "", found) for found in lines}), (
        "each pair of lines once"
    )
    configure(detect_races=False, seed=seed)
    assert run(library, name, **launch)[0] == ""


@pytest.mark.parametrize("seed", range(3))
def test_what_is_ordered_is_no_race(library: ctypes.CDLL, configure: Any, seed: int) -> None:
    configure(seed=seed)
    said, out = run(library, "with_barrier")
    assert said == "" and out[:64].tolist() == [*range(1, 64), 0]
    said, out = run(library, "with_warp_barriers", block=32)
    assert said == "" and out[:32].tolist() == [i ^ 17 for i in range(32)]
    said, out = run(library, "half_warp_shuffle", block=32)
    assert said == "" and out[:32].tolist() == [i ^ 8 if i < 16 else i for i in range(32)]
    said, out = run(library, "atomics", grid=5)
    assert said == "" and out[0] == 5 * 64 - 1
    assert run(library, "load_of_a_copy", block=32)[0] == ""
    assert run(library, "vector_of_ints", n=2, block=1, shared_bytes=64)[0] == ""
    said, out = run(library, "bytes")
    assert said == "" and out.view(torch.uint8)[:64].tolist() == [i ^ 1 for i in range(64)]


FAULTY = [
    (
        "past_end",
        {},
        r"thread \(63, 0, 0\): write of 4 bytes 4 bytes past the end of shared array values "
        r"\(256 bytes\), by {p[threadIdx.x + 1] =}$",
    ),
    (
        "before_begin",
        {"n": 64},
        r"thread \(\d+, 0, 0\): read of 4 bytes \d+ bytes before shared array values \(256 bytes\), by {out[}",
    ),
    (
        "past_dynamic",
        {"shared_bytes": 40, "n": 10},
        r"thread \(0, 0, 0\): write of 4 bytes 4 bytes past the end of dynamic shared memory \(40 bytes\), by {if}",
    ),
    (
        "past_dynamic",
        {"shared_bytes": 0, "n": -1},
        r"thread \(0, 0, 0\): write of 4 bytes 4 bytes before dynamic shared memory \(0 bytes\), by {if}",
    ),
    ("outside_row", {"n": 64}, r"index 64 is outside an array of type 'int \[64\]', at {values[thr}"),
    ("outside_registers", {"n": 1}, r"index 4 is outside an array of type 'int \[4\]', at {values[n}"),
    (
        "misaligned",
        {"n": 2},
        r"misaligned access: 0x\w+ is no address of type '(struct )?int4', which is aligned to 16 "
        "bytes, at {reinterpret}",
    ),
    ("memcpy_past_end", {"n": 65}, r"read of 260 bytes 4 bytes past the end of shared array values .*, by {std::}"),
    ("large_copy_past_end", {}, r"read of 260 bytes 4 bytes past the end of shared array values .*, by {Large*}"),
    ("disturbed_copy", {"n": 1}, r"write of 4 bytes, by {n == 1}, of what the copy_async at .*{<16>} reads or writes"),
    ("disturbed_copy", {"n": 2}, r"read of 4 bytes, by {n == 2}, of what the copy_async at .*{<16>} writes and nobody"),
    ("disturbed_copy", {"n": 3}, r"write of 4 bytes, by {n == 3}, of what the copy_async at .*{<16>} reads or writes"),
    ("disturbed_copy", {"n": 4}, r"write of 4 bytes, by .*{<4>}, of what the copy_async at .*{<16>} reads or writes"),
    ("overlong_copy", {"n": 20}, r"copy_async at .*{<16>}: 20 bytes of 16$"),
    ("overlong_copy", {"n": -1}, r"copy_async at .*{<16>}: 18446744073709551615 bytes of 16$"),
    (
        "load_of_a_copy",
        {"block": 32, "n": 1},
        r"read of 16 bytes, by .*{load_matr}, of what the copy_async at .*{<16>} writes and nobody has waited for$",
    ),
    ("two_products", {"block": 32}, r"divergent mma_m16n8k16: lane \d+ calls another form of it than lane 0$"),
    ("two_loads", {"block": 32}, r"divergent load_matrices: lane 16 calls another form of it than lane 0$"),
    ("vector_of_ints", {"n": 0}, r"misaligned access: 0x\w+ is no address of type .*int4', .* 16 bytes, at {n == 0}"),
    (
        "vector_of_ints",
        {"n": 1, "shared_bytes": 64, "block": 1},
        r"misaligned access: 0x\w+ is no address of type .*Wide', .* 32 bytes, at {n == 1}",
    ),
    ("misaligned_atomic", {"n": 2}, r"misaligned atomic update: 0x\w+ is not aligned to 4 bytes, at {atomicAdd}"),
    (
        "divergent_shuffle",
        {"block": 32},
        r"thread \(\d+, 0, 0\): divergent __shfl_xor_sync at {__shfl}: the mask 0xffffffff names lane 16, but thread "
        r"\(16, 0, 0\) has returned",
    ),
    (
        "divergent_shuffle",
        {"block": 16},
        r"divergent __shfl_xor_sync at {__shfl}: the mask 0xffffffff names lane 16, which the block does not have",
    ),
    (
        "shuffle_against_barrier",
        {},
        r"divergent __shfl_xor_sync at {__shfl}: the mask 0xffffffff names lane 16, but thread \(\d+, 0, 0\) waits in "
        r"__syncthreads at {__syncthreads}",
    ),
    (
        "shuffle_outside_mask",
        {"block": 32},
        r"thread \((?P<lane>\d+), 0, 0\): __shfl_xor_sync at {__shfl}: lane (?P=lane) reads lane \d+, which the mask "
        r"0x0000ffff does not name",
    ),
    (
        "caller_outside_mask",
        {"block": 32},
        r"thread \(\d+, 0, 0\): __ballot_sync at {__ballot}: the mask 0x0000ffff does not name the calling lane \d+",
    ),
    (
        "divergent_barrier",
        {},
        rf"thread \(\d+, 0, 0\): divergent barrier: __syncthreads at {ANY_LINE} while thread \(\d+, 0, 0\) waits in "
        rf"__syncthreads at {ANY_LINE}",
    ),
    (
        "unreached_barrier",
        {},
        r"thread \(\d+, 0, 0\): __syncthreads at {__sync} is never reached by thread \(40, 0, 0\), which has returned",
    ),
    (
        "too_much_shared",
        {},
        r"shared array values: the declared shared arrays grow to 120000 bytes, and a kernel can have 49152",
    ),
    (
        "past_end",
        {"shared_bytes": 49152 - 252},
        r"shared array values: the block's shared memory grows to 49156 bytes, and it has 49152",
    ),
]


@own_checks
@pytest.mark.parametrize(
    ("name", "launch", "pattern"), FAULTY, ids=[f"{fault[0]}-{i}" for i, fault in enumerate(FAULTY)]
)
def test_a_fault_names_kernel_block_thread_and_line(
    library: ctypes.CDLL, configure: Any, name: str, launch: Any, pattern: str
) -> None:
    pattern = re.sub(r"{(.*?)}", lambda text: re.escape(line(text[1], name)), pattern)
    for seed in range(3):
        configure(seed=seed)
        said, _ = run(library, name, grid=1, **launch)
        assert re.search(f"^kernel {name}, block \\(0, 0, 0\\), .*{pattern}", said), said
        assert run(library, "with_barrier")[0] == "", "the next launch is not harmed"


RUN = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
out = (ctypes.c_int * 256)()
library.run(sys.argv[2].encode(), 1, 64, 40, out, int(sys.argv[3]))
"""


@pytest.mark.skipif(not ADDRESS, reason="for make sanitize")
@pytest.mark.parametrize(
    ("name", "n", "message"),
    [
        ("past_global", 256, "heap-buffer-overflow"),
        ("past_end", 0, "use-after-poison"),
        ("before_begin", 64, "use-after-poison"),
        ("past_dynamic", 10, "use-after-poison"),
        ("outside_row", 64, "index 64 out of bounds for type 'int [64]'"),
        ("misaligned", 2, "misaligned address"),
    ],
)
def test_address_sanitizer_sees(library: ctypes.CDLL, name: str, n: int, message: str) -> None:
    command = [sys.executable, "-c", RUN, library._name, name, str(n)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and message in done.stderr and "faults.cu" in done.stderr, done.stderr
    command[-2:] = ["with_barrier", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_an_unwritten_read_shows_in_one_of_two_poisons(library: ctypes.CDLL, configure: Any) -> None:
    results = []
    for poison in (0xFF, 0x3C):
        configure(poison=poison)
        said, out = run(library, "unwritten")
        assert said == ""
        results.append(out)
    assert (results[0] != results[1]).nonzero().flatten().tolist() == [63]


def test_a_launch_that_cuda_refuses(library: ctypes.CDLL, configure: Any) -> None:
    assert run(library, "atomics", block=1025)[0] == "invalid configuration argument"
    assert run(library, "atomics", grid=0)[0] == "invalid configuration argument"
    assert run(library, "atomics", shared_bytes=49153)[0] == "invalid argument"
    assert run(library, "atomics", shared_bytes=49152)[0] == ""


@pytest.mark.parametrize("bound", [64, 96])
def test_a_launch_above_its_launch_bounds(library: ctypes.CDLL, configure: Any, bound: int) -> None:
    name = f"bounded<{bound}>"
    assert run(library, name, block=bound)[0] == ""
    message = f"kernel {name}: launched with {bound + 1} threads a block, and its __launch_bounds__ are {bound}"
    assert run(library, name, block=bound + 1)[0] == message


def test_a_kernel_behind_one_with_launch_bounds(library: ctypes.CDLL, configure: Any) -> None:
    assert run(library, "unbounded", block=256)[0] == ""
    assert "__launch_bounds__ are 32" in run(library, "bounded_before")[0]


class Params(ctypes.Structure):
    names = ("a", "b", "k", "c", "counts", "sum", "pair", "sum64")
    _fields_ = tuple((name, ctypes.c_int if name == "k" else ctypes.c_void_p) for name in names)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_right_kernel_that_uses_everything(library: ctypes.CDLL, configure: Any, dtype: torch.dtype) -> None:
    blocks, k = 5, 3
    a, b = torch.randn(16, 16 * k).to(dtype), torch.randn(16 * k, 8).to(dtype)
    first = None
    for seed, poison, threads in itertools.product(range(2), (0xFF, 0x3C), (1, 2)):
        configure(seed=seed, poison=poison, threads=threads)
        c, counts, total = torch.full((blocks, 16, 8), torch.nan), torch.zeros(6, dtype=torch.int32), torch.zeros(1)
        pair, total64 = torch.zeros(2, dtype=dtype), torch.zeros(1, dtype=torch.float64)
        pointers = [x.data_ptr() for x in (a, b, c, counts, total, pair, total64)]
        library.features(int(dtype == torch.float16), blocks, Params(*pointers[:2], k, *pointers[2:]))
        torch.testing.assert_close(c, (a.double() @ b.double()).float().expand_as(c), rtol=1e-5, atol=1e-5)
        assert counts.tolist() == [48, 1, 1, 5096, blocks * 96, 95]
        assert total.item() == blocks * sum(range(96)) and total64.item() == pytest.approx(blocks * sum(range(96)) / 3)
        expected = torch.tensor(0.0, dtype=dtype)
        for _ in range(blocks * 96):  # a 16-bit sum of ones stops growing where one is half a step
            expected = expected + 1
        assert pair.tolist() == [expected.item(), -expected.item()]
        first = c if first is None else first
        assert torch.equal(c, first)


class Intrinsics(ctypes.Structure):
    _fields_ = (
        *[(name, ctypes.c_void_p) for name in ("failed", "ints", "unsigneds", "longs", "floats", "table", "moved")],
        ("one", ctypes.c_float),
    )


@pytest.mark.parametrize("seed", range(2))
def test_every_function_of_the_device(library: ctypes.CDLL, configure: Any, seed: int) -> None:
    configure(seed=seed)
    start = [0, 1000, 0, -1, 0, 0, -1, 0, 0, 0, 0, 0]
    failed, floats = torch.zeros(1, dtype=torch.int32), torch.full((1,), -1.0)
    table, moved = torch.arange(128, dtype=torch.int32), torch.zeros(9, 128, dtype=torch.int32)
    words = [torch.tensor(start, dtype=dtype) for dtype in (torch.int32, torch.int32, torch.int64)]
    library.intrinsics(Intrinsics(*[x.data_ptr() for x in (failed, *words, floats, table, moved)], 1.0))
    assert failed.item() == 0, f"line {failed.item()} of intrinsics.cu"
    assert torch.equal(moved, table.expand_as(moved))
    threads, bits = 9 * 64, 2**31 - 1
    for word in words:  # of 31 bits two are toggled three times in each of the nine blocks, the others twice
        last, swapped, swaps = word[6:9].tolist()
        assert word[:6].tolist() == [threads, 0, 63, ~bits, bits, 3]
        assert 0 <= last < 64 and 1 <= swapped == swaps <= 64
    assert words[0][9] == words[1][9] == -2 * threads
    assert words[1][10:].tolist() == [threads % 5, -threads % 5]
    assert 0 <= floats.item() < 64


@pytest.mark.skipif(shutil.which("nvcc") is None or ADDRESS, reason="needs nvcc")
@pytest.mark.parametrize("source", FEATURES, ids=lambda source: source.stem)
def test_the_same_source_is_cuda(source: Path, tmp_path: Path) -> None:
    command = ["nvcc", "-std=c++20", "-arch=sm_80", f"-I{ROOT / 'csrc'}", "-c", source, "-o", tmp_path / "features.o"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
