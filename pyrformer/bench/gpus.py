"""What a few GPUs can do at most: the numbers that an estimate divides by.

Sources: NVIDIA's whitepapers "Turing GPU Architecture" (T4), "A100 Tensor Core GPU Architecture", "Ada GPU
Architecture" (RTX 4090), "H100 Tensor Core GPU Architecture", and the data sheets of T4, H100 SXM and H200 SXM for
clocks and memory; limits of a multiprocessor from the CUDA C++ Programming Guide, table "Technical Specifications per
Compute Capability". Tensor-core rates are dense, with float32 accumulation.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Registers are given to a warp in units of so many; every architecture here.
REGISTER_UNIT = 256
REGISTERS = 65536
#: Shared memory is given to a block in units of so many bytes.
SHARED_UNIT = 128


@dataclass(frozen=True)
class Gpu:
    """A GPU at its boost clock.

    ``lanes``: float32 multiply-adds a multiprocessor starts a clock; ``l1``: bytes a clock that its first-level cache
    and shared memory give; ``tensor``: FLOP/s of 16-bit floats on tensor cores; ``shared``: bytes of shared
    memory; ``reserved``: bytes of it that each block costs besides its own; ``memory``: bytes;
    ``general``: whether it has only the kernels that are for every architecture.
    """

    name: str
    arch: str
    multiprocessors: int
    clock: float
    lanes: int
    l1: int
    bandwidth: float
    tensor: float
    memory: float
    warps: int
    blocks: int
    shared: int
    reserved: int
    general: bool = False

    @property
    def own(self) -> str:
        """The target that kernels may be for alone, unless it is taken with those that are ``general``."""
        return "" if self.general else f"{self.arch}a"

    @property
    def flops(self) -> float:
        """FLOP/s in float32, a multiply-add counted as two."""
        return 2 * self.multiprocessors * self.lanes * self.clock

    @property
    def precisions(self) -> tuple[str, ...]:
        """What it computes in; bfloat16 from compute capability 8.0 on."""
        half = ("bfloat16",) if int(self.arch.removeprefix("sm_")) >= 80 else ()
        return ("float32", *half, "float16")

    def occupancy(self, threads: int, registers: int, shared: int) -> int:
        """How many blocks of a kernel one multiprocessor holds: the least that warps, registers, shared memory and the
        limit of blocks allow. Source: the CUDA C++ Best Practices Guide, "Calculating Occupancy"."""
        warps = -(-threads // 32)
        per_warp = -(-32 * registers // REGISTER_UNIT) * REGISTER_UNIT
        # Registers belong to the four partitions of a multiprocessor.
        by_registers = 4 * (REGISTERS // 4 // per_warp) // warps
        own = -(-(shared + self.reserved) // SHARED_UNIT) * SHARED_UNIT
        by_shared = self.shared // own if own else self.blocks
        return min(self.blocks, self.warps // warps, by_registers, by_shared)


GPUS = {
    "h100": Gpu("H100 SXM", "sm_90", 132, 1.98e9, 128, 128, 3.35e12, 989e12, 80e9, 64, 32, 228 << 10, 1024),
    "h200": Gpu("H200 SXM", "sm_90", 132, 1.98e9, 128, 128, 4.8e12, 989e12, 141e9, 64, 32, 228 << 10, 1024),
    "a100": Gpu("A100 SXM", "sm_80", 108, 1.41e9, 64, 128, 2.04e12, 312e12, 80e9, 64, 32, 164 << 10, 1024),
    "rtx4090": Gpu(
        "RTX 4090", "sm_89", 128, 2.52e9, 128, 128, 1.008e12, 165e12, 24e9, 48, 24, 100 << 10, 1024
    ),
    "t4": Gpu("T4", "sm_75", 40, 1.59e9, 64, 64, 0.32e12, 65e12, 15e9, 32, 16, 64 << 10, 0),
}
