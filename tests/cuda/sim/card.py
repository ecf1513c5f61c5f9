"""A pretended GPU behind the executor's interface: streams, events, captured graphs, over the memory of `machine`.

Work waits in its stream until someone needs it: nothing runs before an event is synchronised, and then only what that
event depends on. So a host that reads or reuses pinned memory too early, or a stream that lacks a wait, computes with
wrong or unwritten values. With `early`, the streams made after the first run at once instead, which shows the opposite
mistake: overwriting what the first stream has yet to read.

Kernels run on the interpreter or, with `twins`, as the NumPy functions of `twins.py`, or both, compared.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import machine, twins
from .machine import GLOBAL_BASE
from .memory import HALF, POISON, WORD, Fault

Work = Callable[[], None]


@dataclass(eq=False)
class Stream:
    """Work in order; `done` of it has run."""

    number: int
    work: list[Work] = field(default_factory=list)
    done: int = 0

    def run(self, end: int) -> None:
        """Runs the first `end` pieces of work."""
        while self.done < end:
            self.done += 1
            self.work[self.done - 1]()


@dataclass(eq=False)
class Event:
    """A place in a stream."""

    stream: Stream | None = None
    end: int = 0

    def happen(self) -> None:
        """Runs what the event stands for."""
        if self.stream:
            self.stream.run(self.end)


@dataclass(eq=False)
class Memory:
    """Device memory, given back with the last reference."""

    address: int
    size: int


class Card:
    """What `pyrformer.executors.device.Device` describes."""

    def __init__(
        self, programs: Mapping[str, machine.Program] | None, words: int = 1 << 18, *,
        early: bool = False, how: str = "twins",
    ) -> None:  # fmt: skip
        self.device = machine.Device(programs or {}, words)
        self.early, self.how = early, how
        self.streams: list[Stream] = []
        self.capture: tuple[Stream, list[Work]] | None = None
        #: Every request for memory, streams, events; launches that ran; graphs replayed.
        self.allocations = self.launches = self.replays = 0
        self.kernels: set[str] = set()
        self.prepared: set[str] = set()

    # -- What may not happen during capture -------------------------------------------------------------------------

    def _not_captured(self, what: str) -> None:
        if self.capture:
            raise Fault(f"{what} while a stream is captured")

    def _allocate(self) -> None:
        self._not_captured("allocation")
        self.allocations += 1

    def memory(self, size: int, *, zero: bool = False) -> Memory:
        """Words that belong to nobody else."""
        self._allocate()
        words = -(-size // WORD)
        buffer = self.device.empty((words,), np.uint32)
        if zero:
            self.device.write(buffer, np.zeros(words))
        weakref.finalize(memory := Memory(buffer.address, size), self._free, buffer.address, words)
        return memory

    def _free(self, address: int, words: int) -> None:
        at = (address - GLOBAL_BASE) // WORD
        m = self.device.memory
        m.allocated[2 * at : 2 * (at + words)] = m.written[2 * at : 2 * (at + words)] = False
        m.data[at : at + words] = POISON

    def free_bytes(self) -> int:
        """What is left."""
        return len(self.device.memory.data) * WORD - self.device.end

    def pinned(self, size: int) -> np.ndarray:
        """Host memory full of nonsense."""
        self._allocate()
        return np.full(size, 0xFF, np.uint8)

    def stream(self) -> Stream:
        """A new stream."""
        self._allocate()
        self.streams.append(Stream(len(self.streams)))
        return self.streams[-1]

    def event(self) -> Event:
        """A new event."""
        self._allocate()
        return Event()

    # -- Work -------------------------------------------------------------------------------------------------------

    def _add(self, stream: Stream, work: Work) -> None:
        stream.work.append(work)
        if self.early and stream.number > 0:
            stream.run(len(stream.work))

    def _captured(self, stream: Stream, work: Work) -> None:
        if self.capture and self.capture[0] is stream:
            self.capture[1].append(work)
        else:
            self._add(stream, work)

    def view(self, address: int, size: int, *, write: bool = False) -> np.ndarray:
        """Bytes of device memory, all of them allocated and, to be read, written."""
        halves = twins.matrix(self.device.memory, address, 1, size // HALF, 0, np.uint16, write=write)
        return halves[0].view(np.uint8)

    def upload(self, stream: Stream, to: int, host: np.ndarray) -> None:
        """Host to device."""
        self._not_captured("copy from the host")

        def work() -> None:
            self.view(to, host.size, write=True)[:] = host

        self._add(stream, work)

    def download(self, stream: Stream, host: np.ndarray, start: int) -> None:
        """Device to host."""
        self._not_captured("copy to the host")

        def work() -> None:
            host[:] = self.view(start, host.size)

        self._add(stream, work)

    def copy(self, stream: Stream, to: int, start: int, size: int) -> None:
        """Device to device."""

        def work() -> None:
            self.view(to, size, write=True)[:] = self.view(start, size)

        self._captured(stream, work)

    def record(self, event: Event, stream: Stream) -> None:
        """The event stands for all work so far."""
        self._not_captured("recording an event")
        event.stream, event.end = stream, len(stream.work)

    def wait(self, stream: Stream, event: Event) -> None:
        """Orders the stream behind the event as it is now."""
        self._not_captured("waiting for an event")
        self._add(stream, Event(event.stream, event.end).happen)

    def synchronize(self, event: Event) -> None:
        """Lets the event happen."""
        self._not_captured("synchronisation")
        event.happen()

    def begin_capture(self, stream: Stream) -> None:
        """Notes down from here on."""
        self._not_captured("capture")
        self.capture = (stream, [])

    def end_capture(self, stream: Stream) -> list[Work]:
        """What was noted down."""
        if not self.capture or self.capture[0] is not stream:
            raise Fault("the end of a capture that was not begun")
        graph, self.capture = self.capture[1], None
        return graph

    def replay(self, stream: Stream, graph: list[Work]) -> None:
        """All of it again."""
        self._not_captured("replay")
        self.replays += 1
        for work in graph:
            self._add(stream, work)

    # -- Computation ------------------------------------------------------------------------------------------------

    def product(self, stream: Stream, product: Any) -> None:
        """A matrix product in float64, rounded once."""

        def work() -> None:
            with np.errstate(all="ignore"):
                twins.product(self.device.memory, product)

        self._captured(stream, work)

    def prepare(self, kernels: Iterable[str]) -> None:
        """All kernels are there; notes which were asked for."""
        self._not_captured("loading of kernels")
        self.prepared.update(kernels)

    def launch(self, stream: Stream, kernel: str, grid: Any, block: Any, args: tuple[Any, ...]) -> None:
        """A kernel."""
        grid, block = tuple(grid), tuple(block)
        self._captured(stream, lambda: self._run(kernel, grid, block, args))

    def _run(self, kernel: str, grid: Any, block: Any, args: tuple[Any, ...]) -> None:
        self.launches += 1
        self.kernels.add(kernel)
        m = self.device.memory
        if self.how == "interpreter":
            self.device.launch(kernel, grid, block, *args)
            return
        before = m.data.copy(), m.written.copy()
        twins.launch(m, kernel, grid, args)
        if self.how == "both":
            twin = m.data.copy(), m.written.copy()
            m.data[:], m.written[:] = before
            self.device.launch(kernel, grid, block, *args)
            self._compare(kernel, *twin)

    def _compare(self, kernel: str, data: np.ndarray, written: np.ndarray) -> None:
        """The interpreter's results are kept; the twin's must be close. Integers are equal bit for bit."""
        m = self.device.memory
        if (m.written != written).any():
            at = int(np.flatnonzero(m.written != written)[0])
            raise Fault(
                f"{kernel} and its twin write other memory, the first at {GLOBAL_BASE + at * HALF:#x}"
            )
        wide, halves = m.data != data, m.data.view(np.uint16) != data.view(np.uint16)
        narrow = m.narrow.view(np.uint16) != 0
        kind = kernel.rsplit("_", 1)[1]
        rounds = kernel.startswith("attention") and kind in twins.HALF_TOLERANCE
        tolerance = twins.HALF_TOLERANCE[kind] if rounds else twins.TOLERANCE
        self._near(
            kernel, *(x[wide & ~narrow].view(np.float32) for x in (m.data, data)), tolerance, tolerance
        )
        if kind in twins.LAST_PLACE:
            stored, both = twins.STORED[kind], halves & m.narrow
            got, want = (twins.widened(x.view(stored)[both]) for x in (m.data, data))
            # It may be rounded the other way: one unit in its last place.
            self._near(kernel, got, want, tolerance, twins.LAST_PLACE[kind])

    def _near(self, kernel: str, got: np.ndarray, want: np.ndarray, absolute: float, relative: float) -> None:
        with np.errstate(invalid="ignore"):
            error = np.abs(got.astype(float) - want) / (absolute + relative * np.abs(want.astype(float)))
        if not (error <= 1).all():
            worst = int(np.nanargmax(np.where(np.isnan(error), np.inf, error)))
            raise Fault(f"{kernel} gives {got[worst]}, its twin {want[worst]}")
