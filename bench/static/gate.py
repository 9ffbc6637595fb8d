"""The gates: what a compiled kernel must show, and the row that reports it."""

from typing import Any, NamedTuple

from bench.static.chip import CHIPS, WARP, Chip
from bench.static.code import BULK, MATRIX, Code, Traffic

# Of what can move 16 bytes at a time. One of two tensors accessed otherwise leaves half; the compiler repeats some
# narrow loads (a bias, in the layout of a matrix product) that the program has once.
ENOUGH = 0.55


class Need(NamedTuple):
    """What one kernel must contain, beside the gates that hold for all.

    Args:
        matrix: the instruction that multiplies its matrices, which takes no other; empty: none; None: any, or none.
        bulk: bulk tensor copies.
        loads, stores: the share of their bytes that can move 16 at a time.
    """

    matrix: str | None = ""
    bulk: bool = False
    loads: float = 0.0
    stores: float = 0.0


class Launch(NamedTuple):
    """One launch of a Triton kernel.

    Args:
        module: where the kernel is.
        specialization: of the kernel's arguments and options, as Triton writes it down.
        arch: the chip's.
        source: Triton's version, and a hash of the kernel and of all that it calls.
    """

    module: str
    kernel: str
    specialization: str
    arch: int
    source: str


class Facts(NamedTuple):
    """One kernel in one configuration, compiled for one chip (by its ``arch``)."""

    kernel: str
    config: str
    arch: int
    code: Code
    need: Need
    tensor_columns: int = 0  # of tensor memory, for a block

    @classmethod
    def of(cls, data: list[Any]) -> "Facts":
        """From what JSON keeps of one."""
        kernel, config, arch, code, need, columns = data
        code = Code(*code)._replace(loads=Traffic(*code[4]), stores=Traffic(*code[5]))
        return cls(kernel, config, arch, code, Need(*need), columns)

    @property
    def chip(self) -> Chip:
        return CHIPS[self.arch]

    @property
    def blocks(self) -> int:
        """Blocks that one SM runs at a time."""
        code = self.code
        return self.chip.resident_blocks(code.threads, code.registers, code.shared_bytes, self.tensor_columns)

    @property
    def occupancy(self) -> float:
        """Warps of those blocks over the most that an SM can host."""
        return self.blocks * -(-self.code.threads // WARP) / self.chip.warps

    def failures(self) -> list[str]:
        """The gates that this kernel fails, each with what was found."""
        code, need, chip = self.code, self.need, self.chip
        found = []
        if code.spills:
            found.append(f"{code.spills} accesses to spilled registers")
        if code.shared_bytes > chip.shared_block:
            found.append(f"{code.shared_bytes} bytes of shared memory where a block has {chip.shared_block}")
        elif not self.blocks:
            found.append("not even one block fits an SM")
        if need.matrix and need.matrix not in code.special:
            found.append(f"no {need.matrix}")
        other = [word for word in MATRIX if word in code.special and word != need.matrix]
        if other and need.matrix is not None:
            found.append(f"{' and '.join(other)} where {need.matrix or 'full float32'} is expected")
        if need.bulk and BULK not in code.special:
            found.append(f"no {BULK}")
        for what, share, bytes in (("loaded", need.loads, code.loads), ("stored", need.stores, code.stores)):
            if bytes.full < ENOUGH * share * bytes.total:
                found.append(f"{bytes.full} of {bytes.total} bytes are {what} 16 at a time")
        return found

    def row(self) -> dict[str, Any]:
        """What is reported."""
        code = self.code
        notes = [f"FAILED: {failure}" for failure in self.failures()]
        notes += [f"{count} {word}" for word, count in code.special.items()]
        for what, bytes in (("loads", code.loads), ("stores", code.stores)):
            notes += [f"16-byte {what} {bytes.full / bytes.total:.0%}"] if bytes.total else []
        return {
            "kernel": self.kernel,
            "config": self.config,
            "chip": str(self.chip),
            "registers": code.registers,
            "spills": code.spills,
            "shared_bytes": code.shared_bytes,
            "occupancy": self.occupancy,
            "notes": ", ".join(notes),
        }
