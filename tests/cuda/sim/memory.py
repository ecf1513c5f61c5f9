"""Memory that knows who touched each word: bounds, initialisation, races.

A word is four bytes. Each keeps the stamp of its last writer and of two readers. A stamp is one integer:

    bits 46 ..: block   36 .. 45: thread in block   16 .. 35: block barriers passed   0 .. 15: warp barriers passed

Two accesses by different threads, at least one of them a write, race unless a block barrier lies between them (same
block) or a warp barrier does (same warp). Shuffles order nothing. Blocks of one launch are never ordered.
"""

from __future__ import annotations

import numpy as np

WORD = 4
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


class Memory:
    """One address space of `words` words, none of them allocated yet. Addresses start at `base`."""

    def __init__(self, name: str, words: int, base: int) -> None:
        self.name = name
        self.base = base
        self.data = np.full(words, POISON, np.uint32)
        self.allocated = np.zeros(words, bool)
        self.written = np.zeros(words, bool)
        self.writer = np.empty(words, np.int64)
        self.reader = np.empty(words, np.int64)
        self.other_reader = np.empty(words, np.int64)
        self.forget()

    def forget(self) -> None:
        """Orders all that happened before all that follows, as a launch does."""
        for record in (self.writer, self.reader, self.other_reader):
            record.fill(-1)

    def _words(self, address: np.ndarray, count: int, align: int, what: str) -> np.ndarray:
        """Word numbers [lanes, count] of an access, checked."""
        offset = address.astype(np.int64) - self.base
        crooked = np.flatnonzero((offset + self.base) % align)
        if crooked.size:
            at = int(address[crooked[0]])
            raise Fault(
                f"misaligned {what} of {self.name} memory at {at:#x}, no multiple of {align}", crooked[0]
            )
        words = (offset // WORD)[:, None] + np.arange(count)
        outside = (words < 0) | (words >= len(self.data))
        outside[~outside] = ~self.allocated[words[~outside]]
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
            place = int(words[lane, part]) * WORD
            raise Fault(f"race: {what} unsynchronised with {by} at byte {place} of {self.name} memory", lane)

    def load(self, address: np.ndarray, stamps: np.ndarray, count: int, align: int) -> np.ndarray:
        """`count` words from each lane's address: uint32 [lanes, count]."""
        words, stamps = self._words(address, count, align, "read"), stamps[:, None]
        fresh = ~self.written[words]
        if fresh.any():
            lane = int(np.flatnonzero(fresh.any(axis=1))[0])
            raise Fault(f"read of uninitialised {self.name} memory at {int(address[lane]):#x}", lane)
        self._clash(self.writer, words, stamps, "read")
        self._note_readers(words, stamps)
        return self.data[words]

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
        """Writes uint32 [lanes, count] to each lane's address."""
        words, stamps = self._words(address, values.shape[1], align, "write"), stamps[:, None]
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
        self.data[words] = values
        self.written[words] = True
