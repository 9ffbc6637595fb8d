"""Triton kernels as their launchers launch them, recorded and compiled for a chip that is not there.

A module of dlops.kernels says what there is to compile by a function ``sweep(dtype, full)`` that calls its launchers in
every configuration of its tables. It is given tensors without data: a hook of Triton's sees every launch with its
specialisation before the compiler does, and nothing runs. Not for a process with ``TRITON_INTERPRET``.
"""

import importlib
import json
import pkgutil
import re
from collections.abc import Callable
from math import prod
from types import ModuleType
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from bench.static import code
from bench.static.chip import CHIPS, WARP, WIDE_ROWS, Chip
from bench.static.gate import Facts, Launch, Need

DTYPES = (torch.bfloat16, torch.float32)  # one of each width
ALL_DTYPES = (*DTYPES, torch.float16)
SMS = 132
# Kernels that move 16 bytes at a time in fewer of their accesses than the size of their tiles allows: the shares of
# those to load and to store, by what begins a kernel's name and configuration. The first that matches counts.
SHARES = {
    r"conv_kernel .*\bfinal\b|dx_kernel .*\binitial\b": (0.0, 0.0),  # states: few
    r"(conv|dpre|dx)_kernel .*\bstride_[gx]t=1\b": (0.0, 1.0),  # taps are steps apart: among adjacent steps unaligned
    r"conv_update_kernel ": (0.0, 0.0),  # a few steps of each channel, of any number
    r"linear_scan_backward_kernel .*\bstride_al=1\b": (0.25, 1.0),  # the steps next to those of a tile are unaligned
    r"ssd_pairs_kernel .*\btf32x3\b": (0.8, 1.0),  # Triton 3.6 copies dy, z and C 8 bytes at a time
    r"(conv|dpre|dx)_kernel ": (0.35, 1.0),  # as much code for states, where steps are adjacent, as for steps
}
driver: Any = triton.runtime.driver


class _Driver:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, chip: Chip) -> None:
        self.chip = chip

    def get_current_device(self) -> int:
        return self.chip.arch  # Triton keeps a cache for each device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.chip.arch, WARP)


def modules() -> dict[str, ModuleType]:
    """The modules of dlops.kernels, by their last name."""
    package = importlib.import_module("dlops.kernels")
    names = [module.name for module in pkgutil.iter_modules(package.__path__)]
    return {name: importlib.import_module(f"dlops.kernels.{name}") for name in names}


def families() -> list[str]:
    """Those that have launches to compile."""
    return [name for name, module in modules().items() if hasattr(module, "sweep")]


def kernels() -> set[str]:
    """Every kernel in them: what is launched, as opposed to the functions that it calls."""
    found = {name: value for module in modules().values() for name, value in vars(module).items()}
    return {name for name, value in found.items() if isinstance(value, JITFunction) and name.endswith("_kernel")}


def launches(family: str, chip: Chip, full: bool) -> list[Launch]:
    """What the family's kernels are compiled to on the chip, without repetitions."""
    sweep = modules()[family].sweep
    return record(lambda: [sweep(dtype, full) for dtype in (ALL_DTYPES if full else DTYPES)], chip)


def record(run: Callable[[], Any], chip: Chip) -> list[Launch]:
    """The launches that ``run`` makes, which stop short of compiling."""
    found: dict[Launch, None] = {}

    def hook(**event: Any) -> bool:
        fn, specialization = event["fn"], event["compile"]["specialization_data"]
        source = f"{triton.__version__} {fn.jit_function.cache_key}"
        found[Launch(fn.module, fn.name, specialization, chip.arch, source)] = None
        return True  # taken care of

    driver.set_active(_Driver(chip))
    knobs.runtime.jit_cache_hook = hook
    runtime: Any = modules()["runtime"]
    runtime.offline = runtime.Device(chip.arch, SMS)
    try:
        with torch.device("meta"):
            run()
    finally:
        knobs.runtime.jit_cache_hook = None
    return list(found)


def compiled(launch: Launch) -> Facts:
    """The launch's kernel, compiled."""
    chip = CHIPS[launch.arch]
    driver.set_active(_Driver(chip))
    function = getattr(importlib.import_module(launch.module), launch.kernel)
    config = describe(function.arg_names, json.loads(launch.specialization))
    try:
        kernel = function.preload(launch.specialization)
    except Exception as error:
        raise RuntimeError(f"{config}: {error}") from error
    (found,) = code.read(kernel.asm["ptx"], kernel.asm["cubin"]).values()
    found = found._replace(shared_bytes=kernel.metadata.shared)  # all of it is dynamic
    needs = need(kernel.asm["ttir"], found.threads, chip)
    names = f"{launch.kernel} {config}"
    loads, stores = next((shares for start, shares in SHARES.items() if re.match(start, names)), (1.0, 1.0))
    needs = needs._replace(loads=needs.loads * loads, stores=needs.stores * stores)
    return Facts(launch.kernel, config, launch.arch, found, needs, kernel.metadata.tmem_size or 0)


def describe(names: list[str], specialization: dict[str, Any]) -> str:
    """What tells this configuration from others: dtypes, constants ("-bias": there is none), warps, stages."""
    keys, values = specialization["constant_keys"], specialization["constant_vals"]
    constants = {names[index]: value for (index,), value in zip(keys, values, strict=True)}
    signature, options = specialization["signature"], specialization["options"]
    dtypes = [re.sub(r"^\*|^tensordesc<|\[.*", "", t) for t in signature.values() if t.startswith(("*", "tensordesc<"))]
    words = ["/".join(dict.fromkeys(dtypes))]
    for name, value in constants.items():
        if not name.isupper():
            words += [f"-{name}"] if value is None else [f"{name}={value}"]
        elif isinstance(value, bool):
            words += [name] if value else []
        elif not name.startswith("STRIDE"):
            words.append(value if isinstance(value, str) else f"{name}={value}")
    return " ".join([*words, f"warps={options['num_warps']}", f"stages={options['num_stages']}"])


_BYTES = {"bf16": 2, "f16": 2, "f32": 4, "i32": 4, "i64": 8}
_ACCESS = r"tt\.{} .*: tensor<([\dx]+)x!tt\.ptr<(\w+)>>"
_PRODUCT = r"tt\.dot (.*) : tensor<.*-> tensor<(\d+)x\d+xf32>"
_HALF_ARGUMENT = r"tt\.func public .*(?:ptr<|x)b?f16\b"


def need(ttir: str, threads: int, chip: Chip) -> Need:
    """What a kernel must contain, by its program before it is compiled for a chip.

    Matrix products need matrix instructions, but for those of full float32 where the kernel has no 16-bit arguments;
    tiles read through a descriptor need bulk copies. Accesses to tiles of which every thread has 16 bytes or more can
    move 16 at a time.
    """
    halves = re.search(_HALF_ARGUMENT, ttir)
    quick = [int(rows) for how, rows in re.findall(_PRODUCT, ttir) if halves or "inputPrecision" in how]
    matrix = "" if not quick else chip.matrix if max(quick) >= WIDE_ROWS else "mma.sync"

    def share(access: str) -> float:
        found = re.findall(_ACCESS.format(access), ttir)
        tiles = [prod(map(int, shape.split("x"))) * _BYTES[dtype] for shape, dtype in found]
        return sum(tile for tile in tiles if tile >= code.FULL * threads) / sum(tiles) if tiles else 0.0

    return Need(matrix, "tt.descriptor_load" in ttir, share("load"), share("store"))
