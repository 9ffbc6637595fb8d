"""Measuring: time with contenders interleaved, peak memory, the machine's ceilings and its description."""

import contextlib
import datetime
import gc
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

Call = Callable[[], Any]
MIN_ROUNDS, MAX_ROUNDS = 5, 200
LONG = 10.0  # seconds after which 3 rounds are enough


def rounds(contenders: dict[str, Call], device: str, seconds: float, batch: int = 1) -> dict[str, list[float]]:
    """Milliseconds of each contender, one per round. Every round calls each once, starting with another one each
    time, so that the machine's noise hits all alike and times of one round can be paired.

    On a GPU: CUDA events around the call, the L2 cache overwritten before it. With a ``batch`` the time is the host's:
    the mean of so many calls in a row, without waiting for the GPU.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    with _no_gc():
        started = time.perf_counter()
        for i in range(MAX_ROUNDS):
            turn = i % len(names)
            order = {name: contenders[name] for name in names[turn:] + names[:turn]}
            measured = _device_round(order) if device == "cuda" and batch == 1 else _host_round(order, device, batch)
            for name, ms in measured.items():
                times[name].append(ms)
            spent = time.perf_counter() - started
            if i + 1 >= (MIN_ROUNDS if spent < LONG else 3) and spent + spent / (i + 1) > seconds:
                break
    return times


def median(samples: Sequence[float]) -> float:
    return statistics.median(samples)


def spread(samples: Sequence[float]) -> float:
    """The interquartile range."""
    low, _, high = statistics.quantiles(samples, n=4)
    return high - low


def paired(samples: Sequence[float], base: Sequence[float]) -> float:
    """The median over rounds of ``samples / base``."""
    return median([a / b for a, b in zip(samples, base, strict=True)])


def peak_memory(call: Call, device: str) -> int:
    """Bytes that torch's allocator holds at the most during ``call``, beyond what it held before.

    On a GPU ``torch.cuda.max_memory_allocated``; on a CPU the running sum of the allocations and frees that
    torch.profiler records. Scratch memory that a library allocates by itself is not seen.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events: Any = profile.profiler
    changes = [(e.start_ns(), e.nbytes()) for e in events.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda item: item[0]):
        held += change
        peak = max(peak, held)
    return peak


def graphed(call: Call) -> Call:
    """``call`` captured in a CUDA graph; what is returned replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


# ---- the machine ---------------------------------------------------------------------------------------------------


def ceilings(device: str, dtypes: Sequence[str]) -> dict[str, Any]:
    """The best of repeated runs: ``copy``, bytes per second read and written by a copy far larger than the caches, and
    ``matmul``, FLOPs per second of a large matrix product by dtype."""
    size = 1 << 30 if device == "cuda" else 1 << 28
    source, target = (torch.ones(size // 4, device=device) for _ in range(2))
    copy = 2 * size / _best(lambda: target.copy_(source), device)
    return {"copy": copy, "matmul": {dtype: _matmul_rate(device, dtype) for dtype in dtypes}}


def _matmul_rate(device: str, dtype: str) -> float:
    if device == "cpu" and dtype != "float32" and not _fast_half(dtype):
        return _matmul_rate(device, "float32")
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    calls: list[Call] = [lambda: a @ b]
    if device == "cpu":
        calls += [lambda: F.linear(a, b)]
        if torch.backends.mkldnn.is_available():
            calls += [lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")]
    return 2 * size**3 / min(_best(call, device) for call in calls)


def _fast_half(dtype: str) -> bool:
    supported = {"bfloat16": "_is_mkldnn_bf16_supported", "float16": "_is_mkldnn_fp16_supported"}[dtype]
    return torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, supported)()


def machine(device: str) -> dict[str, Any]:
    """The machine's and the software's description; ``name`` identifies the machine among stored results."""
    cpu, cores = _cpu_model(), os.cpu_count() or 1
    capability = torch.backends.cpu.get_cpu_capability()
    about: dict[str, Any] = {
        "name": f"{cpu}, {capability}, {cores} cores",
        "device": device,
        "cpu": cpu,
        "cores": cores,
        "threads": torch.get_num_threads(),
        "cpu_capability": capability,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        about |= {
            "name": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30),
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
    return about


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def _commit() -> str | None:
    """The commit measured, with ``+`` where files differ from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    return None


# ---- one round -----------------------------------------------------------------------------------------------------

_l2: list[torch.Tensor] = []


def _host_round(calls: dict[str, Call], device: str, batch: int) -> dict[str, float]:
    times = {}
    for name, call in calls.items():
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter_ns()
        for _ in range(batch):
            call()
        times[name] = (time.perf_counter_ns() - started) / 1e6 / batch
    return times


def _device_round(calls: dict[str, Call]) -> dict[str, float]:
    if not _l2:
        size = max(64 << 20, 4 * torch.cuda.get_device_properties(0).L2_cache_size)
        _l2.append(torch.empty(size, dtype=torch.int8, device="cuda"))
    events = {name: tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for name in calls}
    for name, call in calls.items():
        _l2[0].zero_()
        events[name][0].record()
        call()
        events[name][1].record()
    torch.cuda.synchronize()
    return {name: start.elapsed_time(stop) for name, (start, stop) in events.items()}


def _best(call: Call, device: str) -> float:
    """The shortest of a few calls, in seconds."""
    for _ in range(2):
        call()
    return min(rounds({"call": call}, device, seconds=0.7)["call"]) / 1e3


@contextlib.contextmanager
def _no_gc() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
