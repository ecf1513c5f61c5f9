"""What an executor asks of a device: memory, streams, events, launches, matrix products, captured graphs.

The interface is as small as the CUDA driver's own, so that what implements it holds no policy: addresses are integers,
all work is asynchronous on a stream, and nothing but :meth:`Device.synchronize` waits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Matrix:
    """Rows in device memory, ``ld`` elements apart."""

    address: int
    rows: int
    cols: int
    ld: int
    #: "f32", "bf16" or "f16".
    dtype: str = "f32"


@dataclass(frozen=True)
class Product:
    """``y = op(a)·op(b) (+ c) (+ bias)``, row-major: op(a) [M, K], op(b) [K, N], y and c [M, N], bias [N]. Factors are
    of one type, all else of the result's: 16-bit factors give their own or float32. Sums are float32."""

    a: Matrix
    ta: bool
    b: Matrix
    tb: bool
    c: Matrix | None
    bias: int | None
    y: Matrix

    @property
    def sizes(self) -> tuple[int, int, int]:
        """M, N, K."""
        return self.y.rows, self.y.cols, self.a.rows if self.ta else self.a.cols


class Memory(Protocol):
    """Device memory, freed with the last reference to it."""

    @property
    def address(self) -> int: ...

    @property
    def size(self) -> int: ...


class Device(Protocol):
    """A CUDA device, or what behaves like one. Streams, events and graphs are opaque to callers."""

    def memory(self, size: int, *, zero: bool = False) -> Memory:
        """``size`` bytes, of unknown contents or zero."""

    def free_bytes(self) -> int:
        """What :meth:`memory` can still give."""

    def pinned(self, size: int) -> Bytes:
        """``size`` bytes of host memory that the device reads and writes without the CPU."""

    def stream(self) -> Any:
        """A new stream; streams are unordered among each other."""

    def event(self) -> Any:
        """A new event."""

    def upload(self, stream: Any, to: int, host: Bytes) -> None:
        """Copies pinned memory to the device."""

    def download(self, stream: Any, host: Bytes, start: int) -> None:
        """Copies device memory to pinned memory."""

    def copy(self, stream: Any, to: int, start: int, size: int) -> None:
        """Copies within the device."""

    def prepare(self, kernels: Iterable[str]) -> None:
        """Makes kernels ready to be launched: compiles or loads what is missing.

        Raises:
            DeviceError: they cannot be compiled.
        """

    def launch(
        self, stream: Any, kernel: str, grid: list[int], block: list[int], args: tuple[np.generic, ...]
    ) -> None:
        """Runs a kernel; arguments are NumPy scalars of the parameters' widths, pointers uint64."""

    def product(self, stream: Any, product: Product) -> None:
        """Runs a matrix product."""

    def record(self, event: Any, stream: Any) -> None:
        """The event happens when all work so far on the stream is done."""

    def wait(self, stream: Any, event: Any) -> None:
        """Later work on the stream starts after the event as last recorded."""

    def synchronize(self, event: Any) -> None:
        """Waits until the event as last recorded has happened."""

    def begin_capture(self, stream: Any) -> None:
        """From here to :meth:`end_capture`, launches and products on the stream are noted down and not run."""

    def end_capture(self, stream: Any) -> Any:
        """The graph of what was noted down."""

    def replay(self, stream: Any, graph: Any) -> None:
        """Runs a graph."""
