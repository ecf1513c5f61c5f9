"""Tensors of bfloat16 behind the interface of `sim.Device`, so that the launches of launches.py serve both types."""

from __future__ import annotations

from typing import Any

import numpy as np
from sim import Buffer, Device
from sim.twins import narrowed, widened


def rounded(x: Any) -> np.ndarray:
    """To the nearest bfloat16, as float32."""
    return widened(narrowed(np.asarray(x, np.float32)))


class Narrow:
    """A device whose tensors are stored as bfloat16, and whose kernels are those for such where they read or write one.
    What callers see is float32."""

    #: What launches.py stores tensors in.
    real = np.uint16

    def __init__(self, device: Device) -> None:
        self.device = device

    def __getattr__(self, name: str) -> Any:
        return getattr(self.device, name)

    def write(self, buffer: Buffer, values: Any) -> None:
        """Copies values, rounded where the buffer is of bfloat16."""
        values = np.asarray(values)
        bits = narrowed(values.astype(np.float32)) if buffer.dtype == np.uint16 else values
        self.device.write(buffer, bits)

    def read(self, buffer: Buffer) -> np.ndarray:
        """A copy; unwritten parts are NaN."""
        found = self.device.read(buffer)
        return widened(found) if buffer.dtype == np.uint16 else found

    def launch(self, kernel: str, grid: Any, block: Any, *args: Any) -> None:
        """Runs a kernel by the name of its twin for float32."""
        if any(isinstance(a, Buffer) and a.dtype == np.uint16 for a in args):
            kernel = kernel.removesuffix("_f32").removesuffix("_bf16") + "_bf16"
        self.device.launch(kernel, grid, block, *args)


def near(got: np.ndarray, want: np.ndarray) -> None:
    """Of results in bfloat16: the nearest, or where float32 arithmetic decides, its neighbour."""
    want = np.asarray(want, float)
    finite = np.isfinite(want) & (np.abs(want) < 3.3e38)
    np.testing.assert_array_equal(got[~finite], want[~finite].astype(np.float32))
    apart = np.abs(got[finite] - want[finite])
    # Half of a unit in the last place is 2^-8 or less.
    allowed = 2.0**-8 * 1.01 * np.abs(want[finite]) + 2e-6
    assert (apart <= allowed).all(), f"{(apart / allowed).max():.3g} times what rounding explains"
