"""What a compiled kernel is made of: its instructions by its PTX, its resources by its cubin."""

import re
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import NamedTuple

FULL = 16  # bytes: the widest access that every chip has
MATRIX = ("mma.sync", "wgmma.mma_async", "tcgen05.mma")
BULK = "cp.async.bulk.tensor"
# In PTX:
_ENTRY = re.compile(r"\.entry (\w+)\(")
_THREADS = re.compile(r"\.(?:reqn|maxn)tid (\d+)")
_ACCESS = re.compile(r"\b(ld|st)((?:\.[\w:]+)*?)(?:\.v(\d))?\.[busf](\d+)\s")  # ld.global.v4.b32
_ELSEWHERE = re.compile(r"\.(?:param|shared|local|const)\b")  # an access that names no space may be to global memory
_ASYNC = re.compile(r"\bcp\.async\.c[ag]\.\S+\s+\[[^]]*\],\s*\[[^]]*\],\s*(\w+)")  # .cg.shared.global [a], [b], 16


class Traffic(NamedTuple):
    """Bytes that a thread's instructions move from or to what is or may be global memory, each counted once."""

    total: int = 0
    full: int = 0  # those that move 16 at a time, or more


class Code(NamedTuple):
    """One compiled kernel.

    Args:
        threads: the most that its blocks can have.
        registers: of a thread.
        spills: instructions that access local memory, where registers are spilled to.
        shared_bytes: static shared memory.
        special: matrix instructions and bulk copies, by PTX's name.
    """

    threads: int
    registers: int
    spills: int
    shared_bytes: int
    loads: Traffic
    stores: Traffic
    special: dict[str, int]


def read(ptx: str, cubin: bytes) -> dict[str, Code]:
    """The kernels of a compiled module by their names, which C++ mangles."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernels.cubin")
        path.write_bytes(cubin)
        usage = _ask("cuobjdump", "-res-usage", path)
        found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
        # Disassembling takes as long as compiling, and what has no stack has spilled nothing.
        spilled = any(stack != "0" for _, _, stack, _ in found)
        spills = _spills(_ask("nvdisasm", "-c", path)) if spilled else {}
    _, *parts = _ENTRY.split(ptx)
    body = dict(zip(parts[::2], parts[1::2], strict=True))
    return {name: _code(body[name], int(regs), spills.get(name, 0), int(shared)) for name, regs, _, shared in found}


def _code(body: str, registers: int, spills: int, shared_bytes: int) -> Code:
    threads = _THREADS.search(body)
    loads = [int(size, 0) for size in _ASYNC.findall(body)]
    stores = []
    for access, qualifiers, vector, bits in _ACCESS.findall(body):
        if not _ELSEWHERE.search(qualifiers):
            (loads if access == "ld" else stores).append(int(vector or 1) * int(bits) // 8)
    special = {word: len(re.findall(rf"\b{re.escape(word)}\.", body)) for word in (*MATRIX, BULK)}
    return Code(
        int(threads[1]) if threads else 1024,
        registers,
        spills,
        shared_bytes,
        Traffic(sum(loads), sum(n for n in loads if n >= FULL)),
        Traffic(sum(stores), sum(n for n in stores if n >= FULL)),
        {word: n for word, n in special.items() if n},
    )


def _spills(sass: str) -> dict[str, int]:
    """Accesses to local memory, by kernel."""
    sections = re.split(r"^\t\.section\t\.text\.", sass, flags=re.MULTILINE)[1:]
    return {text[: text.index(",")]: len(re.findall(r"\*/ .*?\b(?:LDL|STL)\b", text)) for text in sections}


def missing_tool() -> str:
    """One of those that are asked here and is not there, or an empty string."""
    return next((f"{name}, which Triton's wheel carries" for name in ("cuobjdump", "nvdisasm") if not _tool(name)), "")


def _tool(name: str) -> str | None:
    """Where NVIDIA's tool is: in Triton's wheel, or on PATH."""
    triton = find_spec("triton")
    carried = Path(triton.origin).parent / "backends/nvidia/bin" / name if triton and triton.origin else None
    return str(carried) if carried and carried.exists() else which(name)


def _ask(name: str, *question: str | Path) -> str:
    """What the tool says."""
    answer = subprocess.run([_tool(name) or name, *question], capture_output=True, text=True)
    if answer.returncode:
        raise RuntimeError(f"{name}: {answer.stderr.strip()}")
    return answer.stdout + answer.stderr
