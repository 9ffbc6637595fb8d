"""What each chip offers a kernel, and how many blocks of one that lets run at a time."""

from dataclasses import dataclass

WARP = 32


@dataclass(frozen=True)
class Chip:
    """The limits of one compute capability.

    Sources: "Compute Capabilities" in the CUDA Programming Guide (resident blocks and warps, shared memory of an SM and
    of a block, what each block reserves of it), the toolkit's ``cuda_occupancy.h`` (units of allocation, and the
    calculation), "Tensor Memory" in the PTX ISA.

    Args:
        arch: 10 * major + minor.
        nvcc: the architecture that dlops._cuda is compiled for on this chip.
        matrix: the instruction that multiplies matrices, for tiles of at least ``WIDE_ROWS`` rows.
        warps, blocks: resident on one SM.
        shared_sm, shared_block: bytes of shared memory on one SM, and for one block.
    """

    arch: int
    nvcc: str
    matrix: str
    warps: int
    blocks: int
    shared_sm: int
    shared_block: int

    registers = 64 * 1024  # of 32 bits, on one SM
    register_unit = 256  # registers are given to warps in such units
    partitions = 4  # of an SM: each has a fourth of the registers and hosts whole warps
    shared_unit = 128  # bytes
    shared_reserved = 1024  # bytes of each block
    tensor_columns = 512  # of tensor memory

    def __str__(self) -> str:
        return f"sm_{self.arch}"

    def resident_blocks(self, threads: int, registers: int, shared_bytes: int, tensor_columns: int = 0) -> int:
        """Blocks of ``threads`` threads, ``registers`` each, that run on one SM at a time; 0 if not even one does."""
        warps = -(-threads // WARP)
        if shared_bytes > self.shared_block or registers > 255:
            return 0
        limits = [self.blocks, self.warps // warps]
        each = -(-registers * WARP // self.register_unit) * self.register_unit
        if each:
            limits.append(self.registers // self.partitions // each * self.partitions // warps)
        shared = -(-(shared_bytes + self.shared_reserved) // self.shared_unit) * self.shared_unit
        limits.append(self.shared_sm // shared)
        if tensor_columns:
            limits.append(self.tensor_columns // tensor_columns)
        return min(limits)


KB = 1024
WIDE_ROWS = 64  # of a tile: wgmma and tcgen05 multiply no fewer, smaller tiles take mma.sync everywhere
CHIPS = {
    chip.arch: chip
    for chip in (
        Chip(80, "sm_80", "mma.sync", 64, 32, 164 * KB, 163 * KB),
        Chip(90, "sm_90a", "wgmma.mma_async", 64, 32, 228 * KB, 227 * KB),
        Chip(100, "sm_100a", "tcgen05.mma", 64, 32, 228 * KB, 227 * KB),
        Chip(120, "sm_120", "mma.sync", 48, 24, 100 * KB, 99 * KB),
    )
}
