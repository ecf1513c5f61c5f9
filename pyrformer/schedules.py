"""Learning-rate schedules. ``step`` counts updates from 0."""

from __future__ import annotations

import math

#: Names, as Hugging Face's ``lr_scheduler_type`` has them.
SCHEDULES = ("cosine", "linear", "constant")


def learning_rate(
    step: int, *, kind: str, peak: float, floor: float, warmup_steps: int, total_steps: int
) -> float:
    """The rate of update ``step``: (step + 1)/(warmup_steps + 1) of the peak while warming up, then down to the floor.

    "cosine" follows half a wave (Loshchilov and Hutter 2017, equation 5), "linear" a line, "constant" stays up.
    The warm-up is nanoGPT's, which never has a rate of zero.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    if kind == "constant":
        return peak
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    share = 0.5 * (1.0 + math.cos(math.pi * progress)) if kind == "cosine" else 1.0 - progress
    return floor + share * (peak - floor)
