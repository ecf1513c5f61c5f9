"""Tensors of 16 bits behind the interface of `sim.Device`, so that the launches of launches.py serve all types."""

from __future__ import annotations

from typing import Any

import numpy as np
from sim import Buffer, Device
from sim.twins import narrowed, widened

from kernels.launches import HALVES, rounded

#: The largest error of rounding, relative to the number, and the finest that its smallest numbers allow.
ERROR = {"bf16": (2.0**-8, 2e-6), "f16": (2.0**-11, 2e-6)}
#: Where numbers become infinite.
LARGEST = {"bf16": 3.39e38, "f16": 65520.0}


class Narrow:
    """A device whose tensors are stored as "bf16" or "f16", and whose kernels are those for such where they read or
    write one. What callers see is float32."""

    def __init__(self, device: Device, half: str = "bf16") -> None:
        self.device, self.half = device, half
        #: What launches.py stores tensors in.
        self.real = HALVES[half]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.device, name)

    def write(self, buffer: Buffer, values: Any) -> None:
        """Copies values, rounded where the buffer is of bfloat16."""
        values = np.asarray(values)
        bits = narrowed(values.astype(np.float32), self.real) if buffer.dtype == self.real else values
        self.device.write(buffer, bits)

    def read(self, buffer: Buffer) -> np.ndarray:
        """A copy; unwritten parts are NaN."""
        found = self.device.read(buffer)
        return widened(found) if buffer.dtype == self.real else found

    def launch(self, kernel: str, grid: Any, block: Any, *args: Any) -> None:
        """Runs a kernel by the name of its twin for float32."""
        if any(isinstance(a, Buffer) and a.dtype == self.real for a in args):
            kernel = f"{kernel.removesuffix('_f32')}_{self.half}"
        self.device.launch(kernel, grid, block, *args)

    def rounded(self, x: Any) -> np.ndarray:
        """To the nearest number of the type, as float32."""
        return rounded(x, self.half)

    def near(self, got: np.ndarray, want: np.ndarray) -> None:
        """Of results in the type: the nearest, or where float32 arithmetic decides, its neighbour."""
        want = np.asarray(want, float)
        finite = np.isfinite(want) & (np.abs(want) < LARGEST[self.half])
        np.testing.assert_array_equal(got[~finite], self.rounded(want[~finite]))
        apart = np.abs(got[finite] - want[finite])
        relative, absolute = ERROR[self.half]
        allowed = relative * 1.01 * np.abs(want[finite]) + absolute
        assert (apart <= allowed).all(), f"{(apart / allowed).max():.3g} times what rounding explains"
