"""The static gates: each flags its fault, occupancy is what NVIDIA's own calculator says, the command reports."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from shutil import which

import pytest

sys.path.append(str(Path(__file__).parent.parent))  # for bench; the last, since dlops may be installed elsewhere

from bench.static import check, nvcc
from bench.static.chip import CHIPS, WIDE_ROWS
from bench.static.code import BULK, MATRIX, Code, Traffic
from bench.static.gate import Facts, Need

ROOT = Path(__file__).parent.parent
KEYS = ["kernel", "config", "chip", "registers", "spills", "shared_bytes", "occupancy", "notes"]
FULL = Traffic(64, 64)
GOOD = Facts("k", "fp32", 90, Code(128, 64, 0, 1024, FULL, FULL, {}), Need(loads=1.0, stores=1.0))

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
needs_nvcc = pytest.mark.skipif(bool(nvcc.unavailable()), reason=f"needs {nvcc.unavailable()}")


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python's command, without Triton's interpreter."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    return subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True)


def gates(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """python -m bench --static, of the dlops that is installed."""
    start = f"import runpy, sys; sys.path.append({str(ROOT)!r}); runpy.run_module('bench', run_name='__main__')"
    return run("-c", start, "--static", *arguments, **environment)


@pytest.fixture(scope="module")
def compiled() -> list[Facts]:
    done = run(str(ROOT / "tests" / "static_faults.py"))
    assert done.returncode == 0, done.stderr
    return [Facts.of(json.loads(line)) for line in done.stdout.splitlines()]


@needs_triton
def test_compiled_faults(compiled):
    """One failure each, and none of the kernel without a fault."""
    good, *faulty = [facts.failures() for facts in compiled[:7]]
    assert good == []
    expected = [
        r"0 of \d+ bytes are loaded 16 at a time",
        r"0 of \d+ bytes are loaded 16 at a time",
        r"0 of \d+ bytes are stored 16 at a time",
        r"\d+ accesses to spilled registers",
        r"262144 bytes of shared memory where a block has 166912",
        r"no mma\.sync",
    ]
    for (failure,), pattern in zip(faulty, expected, strict=True):
        assert re.fullmatch(pattern, failure)


@needs_triton
def test_matrix_instructions(compiled):
    """Tiles of 64 rows take the chip's own, smaller ones mma.sync, full float32 none."""
    found = {(f.arch, f.config.split(" warps")[0]): f for f in compiled[7:]}
    for arch, word in ((80, "mma.sync"), (90, "wgmma.mma_async"), (100, "tcgen05.mma"), (120, "mma.sync")):
        for config, expected in (("BLOCK=64 tf32", [word]), ("BLOCK=32 tf32", ["mma.sync"]), ("BLOCK=32 ieee", [])):
            facts = found[arch, f"fp32 {config}"]
            assert facts.failures() == []
            assert [*facts.code.special] == expected


@pytest.mark.parametrize(
    ("code", "need", "failure"),
    [
        ({"spills": 3}, {}, "3 accesses to spilled registers"),
        ({"shared_bytes": 233 * 1024}, {}, "238592 bytes of shared memory where a block has 232448"),
        ({"registers": 128, "threads": 1024}, {}, "not even one block fits an SM"),
        ({}, {"matrix": "wgmma.mma_async"}, "no wgmma.mma_async"),
        ({"special": {"mma.sync": 8}}, {}, "mma.sync where full float32 is expected"),
        ({}, {"bulk": True}, f"no {BULK}"),
        ({"loads": Traffic(128, 64)}, {}, "64 of 128 bytes are loaded 16 at a time"),
        ({"stores": Traffic(64, 0)}, {}, "0 of 64 bytes are stored 16 at a time"),
    ],
)
def test_gates(code, need, failure):
    assert GOOD.failures() == []
    bad = GOOD._replace(code=GOOD.code._replace(**code), need=GOOD.need._replace(**need))
    assert bad.failures() == [failure]
    assert f"FAILED: {failure}" in bad.row()["notes"]
    assert Facts.of(json.loads(json.dumps(bad))) == bad


def test_row():
    row = GOOD.row()
    assert list(row) == KEYS
    assert row["chip"] == "sm_90" and row["registers"] == 64
    assert row["occupancy"] == 0.5  # 8 blocks of 4 warps have the 64 K registers, of 64 warps


CALCULATOR = r"""
#include <cstdio>
#include "cuda_occupancy.h"
int main() {
  int major, threads, registers;
  unsigned long warps, shared, sm, block;
  while (scanf("%d %lu %lu %lu %d %d %lu", &major, &warps, &sm, &block, &threads, &registers, &shared) == 7) {
    cudaOccDeviceProp chip;
    chip.computeMajor = major;
    chip.computeMinor = 0;
    chip.maxThreadsPerBlock = 1024;
    chip.maxThreadsPerMultiprocessor = int(warps) * 32;
    chip.regsPerBlock = chip.regsPerMultiprocessor = 65536;
    chip.warpSize = 32;
    chip.sharedMemPerBlock = 48 * 1024;
    chip.sharedMemPerMultiprocessor = sm;
    chip.numSms = 1;
    chip.sharedMemPerBlockOptin = block;
    chip.reservedSharedMemPerBlock = 1024;
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = 1024;
    kernel.numRegs = registers;
    kernel.sharedSizeBytes = 0;
    kernel.partitionedGCConfig = PARTITIONED_GC_OFF;
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    kernel.maxDynamicSharedSizeBytes = shared;
    kernel.numBlockBarriers = 1;
    cudaOccDeviceState state;
    state.carveoutConfig = 100;
    cudaOccResult result;
    const cudaOccError error =
        cudaOccMaxActiveBlocksPerMultiprocessor(&result, &chip, &kernel, &state, threads, shared);
    printf("%d\n", error ? -1 : result.activeBlocksPerMultiprocessor);
  }
}
"""


@needs_triton
@pytest.mark.skipif(which("c++") is None, reason="no C++ compiler")
def test_occupancy(tmp_path):
    """Against NVIDIA's own header, which Triton's wheel carries."""
    spec = find_spec("triton")
    assert spec and spec.origin
    include = Path(spec.origin).parent / "backends" / "nvidia" / "include"
    source, program = tmp_path / "calculator.cpp", tmp_path / "calculator"
    source.write_text(CALCULATOR)
    subprocess.run(["c++", "-w", f"-I{include}", str(source), "-o", str(program)], check=True)
    cases = [
        (chip, threads, registers, shared)
        for chip in CHIPS.values()
        for threads in (32, 96, 128, 256, 512, 1024)
        for registers in (16, 40, 65, 128, 168, 255)
        for shared in (0, 1, 1024, 16512, 50000, chip.shared_block, chip.shared_block + 1)
    ]
    lines = [f"{c.arch // 10} {c.warps} {c.shared_sm} {c.shared_block} {t} {r} {s}\n" for c, t, r, s in cases]
    done = subprocess.run([program], input="".join(lines), capture_output=True, text=True, check=True)
    found = [chip.resident_blocks(threads, registers, shared) for chip, threads, registers, shared in cases]
    assert found == [int(line) for line in done.stdout.split()]


def test_tensor_memory_limits_blocks():
    assert CHIPS[100].resident_blocks(128, 32, 0, tensor_columns=256) == 2


@needs_triton
def test_command(tmp_path):
    """Without nvcc: Triton's rows, a word about the others, success."""
    file = tmp_path / "rows.json"
    done = gates("sum_partials_kernel", "--json", str(file), CUDA_HOME=str(tmp_path), MAX_JOBS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "csrc/cuda is not checked" in done.stdout
    rows = json.loads(file.read_text())
    assert {row["chip"] for row in rows} == {str(chip) for chip in CHIPS.values()}
    assert all(list(row) == KEYS and row["spills"] == 0 for row in rows)


@needs_triton
def test_every_kernel(tmp_path):
    """All that there are pass, on the chip with the largest tables (CI's own step takes all chips); and what their rows
    say agrees with their configurations."""
    file, chip = tmp_path / "rows.json", CHIPS[90]
    done = gates("--chip", str(chip), "--json", str(file))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    rows = json.loads(file.read_text())
    kernels = {
        name for path in (ROOT / "kernels").glob("*.py") for name in re.findall(r"def (\w+_kernel)\(", path.read_text())
    }
    if not nvcc.unavailable():
        kernels |= {name for source in nvcc.sources() for name in nvcc.kernels(source)}
    assert {row["kernel"] for row in rows} == kernels
    for row in rows:
        words, notes = row["config"].split(), row["notes"]
        assert list(row) == KEYS and row["chip"] == str(chip)
        assert row["spills"] == 0 and 0 < row["registers"] < 256
        assert row["shared_bytes"] <= chip.shared_block and 0 < row["occupancy"] <= 1
        assert (BULK in notes) == ("TMA" in words)
        if row["kernel"] in ("linear_act_kernel", "gated_linear_kernel", "maxout_linear_kernel"):
            (rows_of_tile,) = (int(word[8:]) for word in words if word.startswith("BLOCK_M="))
            expected = "" if "ieee" in words else chip.matrix if rows_of_tile >= WIDE_ROWS else "mma.sync"
            assert [word for word in MATRIX if word in notes] == [word for word in (expected,) if word]


def test_command_keeps_measured_results(tmp_path):
    file = tmp_path / "results.json"
    file.write_text('{"machine": {}, "rows": []}')
    done = gates("--json", str(file))
    assert done.returncode == 2 and "holds something else" in done.stderr
    assert file.read_text() == '{"machine": {}, "rows": []}'


@needs_triton
def test_command_rejects_unknown_names(tmp_path):
    done = gates("norm", "no_such_kernel", CUDA_HOME=str(tmp_path), MAX_JOBS="1")
    assert done.returncode == 2
    assert "no kernel or file is called no_such_kernel; csrc/cuda is not checked" in done.stderr


def fails(*_: object) -> list[Facts]:
    raise ValueError("reason")


def task(name: str, work: Callable[..., list[Facts]]) -> check.Task:
    return check.Task("file", frozenset([name]), 90, name, work, ())


@pytest.fixture
def checked(monkeypatch, tmp_path) -> Callable[..., check.Report]:
    """check.check of some tasks."""

    def run(*tasks: check.Task) -> check.Report:
        monkeypatch.setattr(check, "CACHE", tmp_path)
        monkeypatch.setattr(check, "_cuda_tasks", lambda report: tasks)
        monkeypatch.setattr(check, "_triton_tasks", lambda pool, full, report: [])
        return check.check([], False, lambda name, done, of: None)

    return run


def test_failing_compiler_is_reported(checked):
    report = checked(task("bad", fails))
    assert report.failures() == ["bad for sm_90: ValueError: reason"]


def test_dying_process_is_reported(checked):
    assert "a process died" in checked(task("killed", os.abort)).failures()[0]


@pytest.mark.parametrize("left", ["", "null", "[[], ", '[[["k"]], 1.0]', "{}"])
def test_damaged_results_are_not_used(checked, left):
    bad = task("bad", fails)
    assert not checked(bad).facts
    bad.path.write_text(json.dumps([[GOOD], 1.0]))
    assert checked(bad).facts == [GOOD]
    bad.path.write_text(left)
    assert checked(bad).errors


def test_template_arguments():
    name = "void dlops::(anonymous namespace)::forward_kernel<dlops::common::float16, 8, true>(dlops::NormForward)"
    parameters = {"forward_kernel": ["T", "kVec", "kLayer"]}
    assert nvcc.describe(name, parameters) == ("forward_kernel", {"T": "float16", "kVec": "8", "kLayer": "true"})
    assert nvcc.describe("dlops::fill_kernel(float*, long)", {}) == ("fill_kernel", {})
    name = "void dlops::scan_kernel<float, dlops::ScanShape<4, 16, 8>, true>(dlops::Scan)"
    assert nvcc.describe(name, {"scan_kernel": ["T", "Shape", "kEnds"]}) == (
        "scan_kernel",
        {"T": "float", "Shape": "ScanShape<4, 16, 8>", "kEnds": "true"},
    )


@pytest.mark.parametrize(
    ("kernel", "arguments", "shares"),
    [
        ("forward_kernel", {"kVec": "8"}, (1.0, 1.0)),
        ("forward_kernel", {"kVec": "1"}, (0.0, 0.0)),
        ("forward_kernel", {}, (1.0, 1.0)),
        ("skinny_linear_kernel", {"kVec": "8"}, (1.0, 0.0)),
        ("column_sum_kernel", {}, (0.0, 0.0)),
    ],
)
def test_who_must_access_16_bytes(kernel, arguments, shares):
    need = nvcc.need(kernel, arguments)
    assert (need.loads, need.stores) == shares


FAULTS = r"""
template <class T, int kVec>
__global__ void copy_kernel(const T* x, T* y) { y[threadIdx.x] = x[threadIdx.x]; }
template __global__ void copy_kernel<float, 1>(const float*, float*);
template __global__ void copy_kernel<float, 4>(const float*, float*);

template <class T, int kVec>
__global__ void __launch_bounds__(1024, 2) spill_kernel(const float4* x, float4* y) {
  float4 v[16];
  for (int i = 0; i < 16; ++i) v[i] = x[threadIdx.x + 1024 * i];
  __syncthreads();
  for (int i = 0; i < 16; ++i) y[threadIdx.x + 1024 * i] = v[15 - i];
}
template __global__ void spill_kernel<float, 4>(const float4*, float4*);

// To shared or to global memory, as it turns out: by 4 bytes, and by 16.
template <class T>
__global__ void either_kernel(const float4* x, T* y, bool keep) {
  extern __shared__ __align__(16) unsigned char s[];
  T* to = keep ? reinterpret_cast<T*>(s) : y;
  to[threadIdx.x] = *reinterpret_cast<const T*>(x + threadIdx.x);
  __syncthreads();
  y[4096 + threadIdx.x] = to[threadIdx.x ^ 1];
}
template __global__ void either_kernel<float>(const float4*, float*, bool);
template __global__ void either_kernel<float4>(const float4*, float4*, bool);

__global__ void shared_kernel(const float4* x, float4* y) {
  __shared__ float4 s[128];
  s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = s[127 - threadIdx.x];
}
"""


@needs_triton
@needs_nvcc
def test_cuda_faults(tmp_path):
    source = tmp_path / "faults.cu"
    source.write_text(FAULTS)
    found = {(f.kernel, f.config): f for f in nvcc.compiled(source, CHIPS[90])}
    aligned, unaligned = (found["copy_kernel", f"faults T=float kVec={vec}"] for vec in (4, 1))
    spilled = found["spill_kernel", "faults T=float kVec=4"]
    assert unaligned.failures() == found["shared_kernel", "faults"].failures() == []
    assert found["shared_kernel", "faults"].code.shared_bytes == 2048
    assert aligned.failures() == [f"0 of 4 bytes are {done} 16 at a time" for done in ("loaded", "stored")]
    narrow, wide = (found["either_kernel", f"faults T={name}"].code for name in ("float", "float4"))
    assert narrow.loads == narrow.stores == (8, 0) and wide.loads == wide.stores == (32, 32)
    (failure,) = spilled.failures()
    assert re.fullmatch(r"\d+ accesses to spilled registers", failure)
