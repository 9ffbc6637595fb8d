"""The kernels of csrc/cuda, compiled by nvcc for each chip with the flags of dlops._cuda.

Only static shared memory counts, and occupancy is that of the largest block that the launch bounds allow: a launch
decides at run time how many threads and how much dynamic shared memory it takes.
"""

import hashlib
import importlib.util
import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType

from bench.static.chip import Chip
from bench.static.code import missing_tool, read
from bench.static.gate import Facts, Need

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc" / "cuda"

# A kernel's template parameter kVec is the elements of one access. With 1 it serves rows that are not aligned to 16
# bytes; with more, and without such a parameter, it must load and store 16 bytes at a time, but for these shares:
SHARES = {
    "backward_kernel": (0.8, 0.15),  # much of both is sums of the weight's gradient, wherever those are
    "column_sum_kernel": (0.0, 0.0),  # partial sums: few, beside what the kernel before it moved
    "combine_kernel": (0.0, 0.0),  # the same
    "conv1d_kernel": (0.15, 1.0),  # more code for weights and initial states than for steps
    "conv1d_backward_kernel": (0.2, 0.9),  # the same; and for the weight's gradient
    "conv1d_final_kernel": (0.0, 0.0),  # few
    "conv1d_initial_kernel": (0.0, 0.0),  # few
    "conv_update_kernel": (0.0, 0.0),  # a few steps of each channel, in any order
    "scan_kernel": (0.0, 0.0),  # bound by exponentials; elements in the order of either layout
    "scan_backward_kernel": (0.0, 0.0),  # the same
    "scan_chunks_kernel": (0.0, 0.0),  # a state of each chunk
    "scan_ends_kernel": (0.0, 0.0),  # as scan_kernel
    "scan_update_kernel": (0.45, 0.8),  # B and C of halves beside a float32 state; numbers of the channel
    "skinny_linear_kernel": (1.0, 0.0),  # few outputs, beside the weight
}
_KERNEL = re.compile(r"(?:template\s*<([^>]*)>\s*)?__global__\s+void\s+(?:__launch_bounds__\s*\([^)]*\)\s*)?(\w+)\s*\(")
_NAME = re.compile(r"(\w+)(?:<(.*)>)?\(")  # of a demangled kernel, and its template arguments
_COMMA = re.compile(r", (?![^<>]*>)")  # between arguments, not within one such as Shape<4, 8>


@cache
def build() -> ModuleType:
    """setup.py, which knows the toolkit and the flags."""
    spec = importlib.util.spec_from_file_location("dlops_setup", ROOT / "setup.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def command() -> tuple[str, ...]:
    """nvcc with its flags; raises ``build().Missing`` where there is none."""
    setup = build()
    return tuple(setup.nvcc(setup.Toolkit(), setup.find_cxx()))


def unavailable() -> str:
    """Why nothing can be compiled here, or an empty string."""
    try:
        command()
    except build().Missing as missing:
        return str(missing)
    return missing_tool()


def sources() -> list[Path]:
    return sorted(SOURCES.glob("*.cu"))


def kernels(source: Path) -> frozenset[str]:
    """Their names."""
    return frozenset(name for _, name in _KERNEL.findall(source.read_text()))


def key(source: Path, chip: Chip) -> str:
    """A hash of all that the compiled kernels of a file depend on."""
    version = subprocess.run([command()[0], "--version"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(repr((source.name, chip, command(), version)).encode())
    for path in (source, *sorted((ROOT / "csrc").glob("c*/*.h"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def compiled(source: Path, chip: Chip) -> list[Facts]:
    """The kernels of the file, compiled for the chip."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        flags = [f"-arch={chip.nvcc}", "-cubin", "--keep", f"--keep-dir={folder}"]
        done = subprocess.run([*command(), *flags, str(source), "-o", str(cubin)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"nvcc: {done.stderr.strip()}")
        found = read(Path(folder, f"{source.stem}.ptx").read_text(), cubin.read_bytes())
    readable = subprocess.run(["c++filt"], input="\n".join(found), capture_output=True, text=True, check=True).stdout
    parameters = {
        name: [p.split()[-1] for p in text.split(",")] for text, name in _KERNEL.findall(source.read_text()) if text
    }
    facts = []
    for demangled, code in zip(readable.splitlines(), found.values(), strict=True):
        if chip.arch >= 90 and code.shared_bytes:  # the compiler counts what the chip reserves, of which chip.py knows
            code = code._replace(shared_bytes=code.shared_bytes - chip.shared_reserved)
        name, arguments = describe(demangled, parameters)
        config = " ".join([source.stem, *(f"{key}={value}" for key, value in arguments.items())])
        facts.append(Facts(name, config, chip.arch, code, need(name, arguments)))
    return facts


def describe(demangled: str, parameters: dict[str, list[str]]) -> tuple[str, dict[str, str]]:
    """(name, template arguments by parameter) of a kernel such as "void a::f<a::half, 8>(a::P)"."""
    found = _NAME.search(demangled.replace("(anonymous namespace)::", ""))
    assert found, demangled
    arguments = _COMMA.split(re.sub(r"\w+::|\(\w+\)", "", found[2])) if found[2] else []
    return found[1], dict(zip(parameters.get(found[1], map(str, range(9))), arguments, strict=False))


def need(name: str, arguments: dict[str, str]) -> Need:
    """Which accesses must move 16 bytes at a time, by the rule of ``SHARES``. Any matrix instruction may be there."""
    loads, stores = (0.0, 0.0) if arguments.get("kVec") == "1" else SHARES.get(name, (1.0, 1.0))
    return Need(None, loads=loads, stores=stores)
