"""Memory that knows who touched each cell: bounds, initialisation, races.

A cell is a word of four bytes, or half of one in launches of kernels that access halves. Each keeps the stamp of its
last writer and of two readers. A stamp is one integer:

    bits 46 ..: block   36 .. 45: thread in block   16 .. 35: block barriers passed   0 .. 15: warp barriers passed

Two accesses by different threads, at least one of them a write, race unless a block barrier lies between them (same
block) or a warp barrier does (same warp). Shuffles order nothing. Blocks of one launch are never ordered.
"""

from __future__ import annotations

import numpy as np

WORD, HALF = 4, 2
BARRIER_SHIFT = 16
THREAD_SHIFT = 36
WARP_SHIFT = THREAD_SHIFT + 5
BLOCK_SHIFT = 46
BARRIER_BITS = (1 << (THREAD_SHIFT - BARRIER_SHIFT)) - 1
WARP_BARRIER_BITS = (1 << BARRIER_SHIFT) - 1
POISON = 0xFFFFFFFF  # a NaN, and an absurd index


class Fault(Exception):
    """A kernel did what the CUDA programming model forbids."""


def unordered(earlier: np.ndarray, now: np.ndarray) -> np.ndarray:
    """Where an access recorded as `earlier` (negative: none) is another thread's and nothing orders it before `now`."""
    apart = earlier ^ now
    other_block = (apart >> BLOCK_SHIFT) != 0
    other_thread = (apart >> THREAD_SHIFT) != 0
    same_barrier = ((apart >> BARRIER_SHIFT) & BARRIER_BITS) == 0
    found = (earlier >= 0) & (other_block | (other_thread & same_barrier))
    if found.any():
        same_warp = (apart >> WARP_SHIFT) == 0
        found &= ~(same_warp & ((earlier & WARP_BARRIER_BITS) < (now & WARP_BARRIER_BITS)))
    return found


def who(stamp: int) -> str:
    """The thread that made a stamp."""
    return f"block {stamp >> BLOCK_SHIFT} thread {stamp >> THREAD_SHIFT & 1023}"


def flags(of_halves: np.ndarray, size: int) -> tuple[np.ndarray, int]:
    """Flags of halves, seen as one number for each `size` bytes, and that number where all are set."""
    return (of_halves.view(np.uint16), 0x0101) if size == WORD else (of_halves.view(np.uint8), 1)


class Memory:
    """One address space of `words` words, none of them allocated yet. Addresses start at `base`."""

    def __init__(self, name: str, words: int, base: int, cell: int = WORD) -> None:
        self.name = name
        self.base = base
        self.data = np.full(words, POISON, np.uint32)
        #: Of each half of a word.
        self.allocated = np.zeros(2 * words, bool)
        self.written = np.zeros(2 * words, bool)
        #: Whether a twin wrote it as a 16-bit float: how a comparison reads it.
        self.narrow = np.zeros(2 * words, bool)
        #: What a twin's tensors are stored in: float32, float16, or bfloat16 as uint16.
        self.stored: type = np.float32
        self.writer = self.reader = self.other_reader = np.empty(0, np.int64)
        #: How many writes there have been, and the number of each cell's last one, where somebody watches.
        self.clock = 0
        self.age: np.ndarray | None = None
        self.forget(cell)

    def watch(self) -> None:
        """Numbers all writes from here on."""
        self.age = np.zeros(len(self.cells), np.int64)

    def forget(self, cell: int = WORD) -> None:
        """Orders all that happened before all that follows, as a launch does; its cells have so many bytes."""
        self.cell = cell
        self.cells = self.data if cell == WORD else self.data.view(np.uint16)
        self._allocated, self.all_set = flags(self.allocated, cell)
        self._written, _ = flags(self.written, cell)
        if len(self.writer) != len(self.cells):
            self.writer, self.reader, self.other_reader = (
                np.empty(len(self.cells), np.int64) for _ in range(3)
            )
        for record in (self.writer, self.reader, self.other_reader):
            record.fill(-1)

    def _words(self, address: np.ndarray, size: int, align: int, what: str) -> np.ndarray:
        """Cell numbers [lanes, size / cell] of an access of `size` bytes, checked."""
        offset = address.astype(np.int64) - self.base
        crooked = np.flatnonzero((offset + self.base) % align)
        if crooked.size:
            at = int(address[crooked[0]])
            raise Fault(
                f"misaligned {what} of {self.name} memory at {at:#x}, no multiple of {align}", crooked[0]
            )
        words = (offset // self.cell)[:, None] + np.arange(size // self.cell)
        outside = (words < 0) | (words >= len(self.cells))
        outside[~outside] = self._allocated[words[~outside]] != self.all_set
        if outside.any():
            lane = int(np.flatnonzero(outside.any(axis=1))[0])
            raise Fault(f"{what} out of bounds of {self.name} memory at {int(address[lane]):#x}", lane)
        return words

    def _clash(self, record: np.ndarray, words: np.ndarray, stamps: np.ndarray, what: str) -> None:
        earlier = record[words]
        found = unordered(earlier, stamps)
        if found.any():
            lane, part = (int(x[0]) for x in np.nonzero(found))
            by = who(int(earlier[lane, part]))
            place = int(words[lane, part]) * self.cell
            raise Fault(f"race: {what} unsynchronised with {by} at byte {place} of {self.name} memory", lane)

    def load(self, address: np.ndarray, stamps: np.ndarray, size: int, align: int) -> np.ndarray:
        """`size` bytes from each lane's address, as cells [lanes, size / cell]."""
        words, stamps = self._words(address, size, align, "read"), stamps[:, None]
        fresh = self._written[words] != self.all_set
        if fresh.any():
            lane = int(np.flatnonzero(fresh.any(axis=1))[0])
            raise Fault(f"read of uninitialised {self.name} memory at {int(address[lane]):#x}", lane)
        self._clash(self.writer, words, stamps, "read")
        self._note_readers(words, stamps)
        return self.cells[words]

    def _note_readers(self, words: np.ndarray, stamps: np.ndarray) -> None:
        """Keeps two readers a word, of different warps where there are such."""
        before = self.reader[words]
        moved = (before >= 0) & (before != stamps)
        if moved.any():
            self.other_reader[words[moved]] = before[moved]
        self.reader[words] = stamps
        lost = self.reader[words] ^ stamps  # lanes of this access that read the same word and were not kept
        if lost.any():
            stamps = np.broadcast_to(stamps, words.shape)
            same = lost != 0
            self.other_reader[words[same]] = stamps[same]
            other = (lost >> WARP_SHIFT) != 0
            self.other_reader[words[other]] = stamps[other]

    def store(self, address: np.ndarray, stamps: np.ndarray, values: np.ndarray, align: int) -> None:
        """Writes the bytes of values [lanes, ..] to each lane's address."""
        values = values.view(self.cells.dtype)
        words, stamps = self._words(address, values.shape[1] * self.cell, align, "write"), stamps[:, None]
        self._clash(self.writer, words, stamps, "write after a write")
        self._clash(self.reader, words, stamps, "write after a read")
        self._clash(self.other_reader, words, stamps, "write after a read")
        self.writer[words] = stamps
        twice = self.writer[words] != stamps
        if twice.any():
            lane, part = (int(x[0]) for x in np.nonzero(twice))
            raise Fault(
                f"race: {who(int(self.writer[words[lane, part]]))} writes the same word in the same instruction",
                lane,
            )
        self.reader[words] = -1
        self.other_reader[words] = -1
        self.cells[words] = values
        self._written[words] = self.all_set
        if self.age is not None:
            self.clock += 1
            self.age[words] = self.clock
