"""What a launch moves and computes, counted while the interpreter runs it."""

from __future__ import annotations

import re

import numpy as np

from .memory import HALF, WORD, Memory
from .ptx import Instruction

SECTOR, BANKS = 32, 32
_TWO = re.compile(r"fma\..*f32")
_ONE = re.compile(r"(add|sub|mul|div|sqrt|rsqrt|rcp|ex2|lg2|min|max)\..*f32")


class Counter:
    """Of one launch. ``sectors``: pieces of 32 bytes of global memory, and ``passes``: rows of the 32 banks of shared
    memory, both summed over the requests of warps; ``least_sectors``, ``least_passes``: how many the bytes of each
    request would fill; ``flops``: float32 operations, a multiply-add as two; ``tensor``: those of tensor cores."""

    def __init__(self, memory: Memory) -> None:
        #: Halves of words of global memory that are read, and that are written.
        self.touched = np.zeros((2, 2 * len(memory.data)), bool)
        self.sectors = self.least_sectors = self.passes = self.least_passes = self.flops = self.tensor = 0

    @property
    def unique(self) -> int:
        """Distinct bytes of global memory that are read, and distinct ones that are written."""
        return int(self.touched.sum()) * HALF

    @property
    def moved(self) -> int:
        """The bytes of the sectors that hold them: what memory gives and takes where caches keep what is used again."""
        return int(self.touched.reshape(2, -1, SECTOR // HALF).any(-1).sum()) * SECTOR

    def access(
        self, memory: Memory, address: np.ndarray, size: int, warps: np.ndarray, write: bool = False
    ) -> None:
        """One instruction of some threads, `size` bytes each."""
        at = ((address - memory.base) // HALF)[:, None] + np.arange(size // HALF)
        warps = np.broadcast_to(warps[:, None], at.shape)
        if memory.name == "global":
            self.touched[int(write), at] = True
            per = SECTOR // HALF
            self.sectors += len(np.unique(warps.reshape(-1) * (1 << 40) + at.reshape(-1) // per))
            self.least_sectors += _rows(warps, at, per)
            return
        # Threads that want the same word are served together; a bank gives one word a pass.
        pairs = np.unique(warps.reshape(-1) * (1 << 40) + at.reshape(-1) // (WORD // HALF))
        slots, counts = np.unique(pairs >> 40, return_inverse=True)
        table = np.zeros((len(slots), BANKS), np.int64)
        np.add.at(table, (counts.reshape(-1), pairs % BANKS), 1)
        self.passes += int(table.max(axis=1).sum())
        self.least_passes += _rows(warps, at // (WORD // HALF), BANKS)

    def arithmetic(self, body: list[Instruction], threads: int) -> None:
        """A basic block that so many threads ran."""
        for instruction in body:
            if _TWO.match(instruction.opcode):
                self.flops += 2 * threads
            elif _ONE.match(instruction.opcode):
                self.flops += threads


def _rows(warps: np.ndarray, at: np.ndarray, per: int) -> int:
    """How many rows of `per` words the distinct words of each warp's request would fill."""
    _, counts = np.unique(np.unique(warps.reshape(-1) * (1 << 40) + at.reshape(-1)) >> 40, return_counts=True)
    return int((-(-counts // per)).sum())
