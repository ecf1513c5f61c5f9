"""What is watched during a run: spikes, the size of updates, time, memory."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from pyrformer import programs
from pyrformer.compile import Array
from pyrformer.executors import begin_get
from pyrformer.model import Model

WINDOW, SIGMAS, LEAST = 128, 6.0, 32


class Spikes:
    """Counts values that lie more than 6 standard deviations above the mean of the 128 before them.

    Nothing is a spike until 32 values are there.
    """

    def __init__(self, values: Iterable[float] = (), count: int = 0):
        self.values: deque[float] = deque(values, maxlen=WINDOW)
        self.count = count

    def add(self, value: float) -> bool:
        """Takes a value; whether it is a spike."""
        known = list(self.values)
        self.values.append(value)
        if len(known) < LEAST:
            return False
        spike = value > statistics.fmean(known) + SIGMAS * statistics.pstdev(known)
        self.count += spike
        return spike


class UpdateRatio:
    """‖change‖ / ‖weights‖ of one update: the median over a few matrices, spread over the model and of at most four
    million values in all."""

    MATRICES, VALUES = 8, 1 << 22

    def __init__(self, model: Model):
        self.model = model
        matrices = [p for p in programs.trainable(model.family) if len(p.shape) == 2]
        chosen = matrices[:: max(1, math.ceil(len(matrices) / self.MATRICES))]
        self.names: list[str] = []
        left = self.VALUES
        for parameter in sorted(chosen, key=lambda p: math.prod(p.shape)):
            left -= math.prod(parameter.shape)
            if left >= 0:
                self.names.append(parameter.name)

    def weights(self) -> Callable[[], dict[str, Array]]:
        """Begins to copy the chosen matrices as they are behind the updates begun so far; call it for the copies."""
        return begin_get(self.model.store, self.names)

    def between(self, before: dict[str, Array], after: dict[str, Array]) -> float:
        """The ratio for the update that made ``after`` of ``before``; 0 without matrices."""
        ratios = []
        for name, value in before.items():
            new, old = after[name].astype(np.float64), value.astype(np.float64)
            ratios.append(float(np.linalg.norm(new - old)) / (float(np.linalg.norm(old)) or 1.0))
        return statistics.median(ratios) if ratios else 0.0


class Clock:
    """Seconds of the wall clock and of the processor since the last look."""

    def __init__(self) -> None:
        self.wall, self.processor = time.perf_counter(), time.process_time()

    def utilisation(self) -> float:
        """Share of the machine's cores that the process kept busy since the last call."""
        wall, processor = time.perf_counter(), time.process_time()
        share = (processor - self.processor) / max(1e-9, (wall - self.wall) * (os.cpu_count() or 1))
        self.wall, self.processor = wall, processor
        return share


def resident_bytes() -> int:
    """Memory that the process holds; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0
