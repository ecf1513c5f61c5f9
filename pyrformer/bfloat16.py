"""bfloat16 for NumPy, which lacks it: its bits, the upper half of a float32's, as ``uint16``."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Bits = npt.NDArray[np.uint16]


def narrowed(value: npt.NDArray[Any]) -> Bits:
    """The bits of the nearest bfloat16, ties to even; of finite values and infinities."""
    bits = value.astype(np.float32).view(np.uint32)
    half = np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
    nearest: npt.NDArray[Any] = (bits + half) >> np.uint32(16)
    return nearest.astype(np.uint16)


def widened(bits: Bits) -> npt.NDArray[np.float32]:
    """The values that bits stand for."""
    wide: npt.NDArray[Any] = bits.astype(np.uint32) << np.uint32(16)
    return wide.view(np.float32)
