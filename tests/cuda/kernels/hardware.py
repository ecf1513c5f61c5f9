"""A real device behind the interface of `sim.Device`, so that the kernels' tests run on it unchanged.

Memory comes from one slab. What no array owns is poisoned, and looked at after each launch: a kernel that writes
between rows or beside an array is found out, as on the interpreter. What it reads there is NaN.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from sim import Buffer, Fault

from pyrformer.executors.device import Device

#: Set by tools/gpu_day.py: the tests of kernels are to run on the device of this machine.
ON_HARDWARE = os.environ.get("PYRFORMER_TEST_DEVICE") == "cuda"
SLAB = 64 << 20
POISON = 0xFF
REDZONE = 256
#: Hardware's approximate functions (`ex2.approx`, `rcp.approx`, …) are off by some units in the last place, where the
#: interpreter's are exact: by how much tolerances grow.
SLACK = 4.0


class Hardware:
    """Arrays on a device, and launches of kernels in order, each waited for."""

    def __init__(self, device: Device, size: int = SLAB) -> None:
        self.device = device
        self.stream, self.event = device.stream(), device.event()
        self.slab = device.memory(size)
        self.host = device.pinned(size)
        self.owned = np.zeros(size, bool)
        self.end = size
        self.fresh()

    def fresh(self) -> Hardware:
        """Forgets all arrays and poisons their memory."""
        self.host[: self.end] = POISON
        self._wait(self.device.upload, self.slab.address, self.host[: self.end])
        self.owned[:] = False
        self.end = REDZONE
        return self

    def _wait(self, act: Any, *args: Any) -> None:
        act(self.stream, *args)
        self.device.record(self.event, self.stream)
        self.device.synchronize(self.event)

    def _place(self, size: int, skew: int) -> int:
        at = self.end + skew
        self.end = -(-(at + size + REDZONE) // 256) * 256
        if self.end > len(self.host):
            raise MemoryError("the slab is full")
        return at

    def _own(self, at: int, shape: tuple[int, ...], dtype: np.dtype) -> Buffer:
        self.owned[at : at + int(np.prod(shape)) * dtype.itemsize] = True
        return Buffer(self.slab.address + at, tuple(shape), dtype)

    def empty(self, shape: tuple[int, ...], dtype: Any = np.float32, skew: int = 0) -> Buffer:
        """Unwritten memory, `skew` elements past a multiple of 256 bytes."""
        dtype = np.dtype(dtype)
        return self._own(
            self._place(int(np.prod(shape)) * dtype.itemsize, skew * dtype.itemsize), shape, dtype
        )

    def strided(self, rows: int, cols: int, stride: int, dtype: Any, skew: int = 0) -> list[Buffer]:
        """Unwritten rows `stride` elements apart."""
        dtype = np.dtype(dtype)
        at = self._place(rows * stride * dtype.itemsize, skew * dtype.itemsize)
        return [self._own(at + r * stride * dtype.itemsize, (cols,), dtype) for r in range(rows)]

    def write(self, buffer: Buffer, values: Any) -> None:
        """Copies `values` to the device."""
        values = np.ascontiguousarray(values, buffer.dtype).reshape(-1).view(np.uint8)
        part = self._part(buffer)
        part[:] = values
        self._wait(self.device.upload, buffer.address, part)

    def _part(self, buffer: Buffer) -> np.ndarray:
        at = buffer.address - self.slab.address
        return self.host[at : at + int(np.prod(buffer.shape)) * buffer.dtype.itemsize]

    def array(self, values: Any, dtype: Any = np.float32, skew: int = 0) -> Buffer:
        """A copy of `values` in new memory."""
        buffer = self.empty(np.shape(values), dtype, skew)
        self.write(buffer, values)
        return buffer

    def read(self, buffer: Buffer) -> np.ndarray:
        """A copy of a buffer; unwritten parts are NaN."""
        part = self._part(buffer)
        self._wait(self.device.download, part, buffer.address)
        return part.copy().view(buffer.dtype).reshape(buffer.shape)

    def launch(self, kernel: str, grid: Any, block: Any, *args: Any) -> None:
        """Runs a kernel and looks at the memory that it must leave alone. Raises Fault where it has not."""
        values = tuple(
            np.uint64(a.address if a else 0) if a is None or isinstance(a, Buffer) else a for a in args
        )
        self._wait(self.device.launch, kernel, _dim(grid), _dim(block), values)
        self._wait(self.device.download, self.host[: self.end], self.slab.address)
        spoiled = np.flatnonzero(~self.owned[: self.end] & (self.host[: self.end] != POISON))
        if spoiled.size:
            raise Fault(f"{kernel} wrote to byte {int(spoiled[0])}, which belongs to nothing")


def _dim(extents: Any) -> list[int]:
    extents = tuple(extents) if isinstance(extents, tuple) else (extents,)
    return [*extents, 1, 1][:3]
