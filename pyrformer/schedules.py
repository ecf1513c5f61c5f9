"""Learning-rate schedules under Hugging Face's names and with their formulas (``transformers/optimization.py``).

``step`` counts updates from 0; with a warm-up, the rate of update 0 is 0.
"""

from __future__ import annotations

import math
from typing import Any

from pyrformer.errors import ConfigError

#: Names, as Hugging Face's ``lr_scheduler_type`` has them, and the settings that each takes.
SCHEDULES: dict[str, tuple[str, ...]] = {
    "cosine": ("num_cycles",),
    "cosine_warmup_with_min_lr": ("num_cycles", "warmup_lr_rate"),
    "cosine_with_restarts": ("num_cycles",),
    "linear": (),
    "polynomial": ("power",),
    "inverse_sqrt": ("timescale",),
    "warmup_stable_decay": ("num_decay_steps", "num_stable_steps", "num_cycles", "warmup_type", "decay_type"),
    "constant": (),
    "constant_with_warmup": (),
}


#: Shapes of a decay and, walked backwards, of a warm-up: share of the way down → share of the height that is left.
SHAPES = ("linear", "cosine", "1-sqrt")


def _fall(shape: str, x: float, num_cycles: float = 0.5) -> float:
    if shape == "linear":
        return 1.0 - x
    if shape == "cosine":
        return 0.5 * (1.0 + math.cos(2.0 * math.pi * num_cycles * x))
    return 1.0 - math.sqrt(x)


def check_settings(kind: str, settings: dict[str, Any]) -> None:
    """Raises ConfigError unless ``settings`` are what the schedule ``kind`` takes: shapes and positive numbers."""
    for name, value in settings.items():
        if name not in SCHEDULES[kind]:
            raise ConfigError(
                f"[train] a {kind} schedule has no setting {name!r}; it takes {SCHEDULES[kind]}"
            )
        if name.endswith("_type"):
            if value not in SHAPES:
                raise ConfigError(f"[train] {name} of the schedule must be one of {SHAPES}, got {value!r}")
            continue
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value <= 0:
            raise ConfigError(f"[train] {name} of the schedule must be a positive number, got {value!r}")


def learning_rate(
    step: int,
    *,
    kind: str,
    peak: float,
    floor: float,
    warmup_steps: int,
    total_steps: int,
    settings: dict[str, Any] | None = None,
) -> float:
    """The rate of update ``step``: step / warmup_steps of the peak while warming up, then down to the floor.

    Args:
        kind: "cosine" (``num_cycles`` of a wave, 0.5), "cosine_with_restarts" (``num_cycles`` half waves, 1),
            "linear", "polynomial" (``power``, 1), "inverse_sqrt" (√(timescale / step); ``timescale``: the warm-up, or
            10000; it knows no floor), "warmup_stable_decay" (up from the floor by ``warmup_type``, "linear"; at the
            peak for ``num_stable_steps``, all that is left; down by ``decay_type``, "cosine", within
            ``num_decay_steps``, a tenth of all; both "linear", "cosine" or "1-sqrt"), "constant",
            "constant_with_warmup" and "cosine_warmup_with_min_lr" (as "cosine", but the first update of the warm-up has
            a rate: its share, or ``warmup_lr_rate`` of the peak).
    """
    s = settings or {}
    if kind == "constant":
        return peak
    if kind == "cosine_warmup_with_min_lr":
        if step < warmup_steps:
            first: float | None = s.get("warmup_lr_rate")
            if first is None:
                return peak * (step + 1) / warmup_steps
            return peak * (first + (1.0 - first) * step / max(1, warmup_steps - 1))
        step += 1
    if kind == "warmup_stable_decay":
        decay = s.get("num_decay_steps", max(1, total_steps // 10))
        stable = s.get("num_stable_steps", total_steps - warmup_steps - decay)
        if step < warmup_steps:
            share = _fall(s.get("warmup_type", "linear"), 1.0 - step / warmup_steps)
        else:
            into = min(1.0, max(0.0, (step - warmup_steps - stable) / decay))
            share = (
                _fall(s.get("decay_type", "cosine"), into, s.get("num_cycles", 0.5)) if into < 1.0 else 0.0
            )
        return floor + max(0.0, share) * (peak - floor)
    if step < warmup_steps:
        return peak * (step / warmup_steps)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if kind == "constant_with_warmup":
        return peak
    if kind == "inverse_sqrt":
        timescale = s.get("timescale", warmup_steps or 10_000)
        return peak / math.sqrt((step + timescale - warmup_steps) / timescale)
    if kind in ("cosine", "cosine_warmup_with_min_lr"):
        share = _fall("cosine", progress, s.get("num_cycles", 0.5))
    elif kind == "cosine_with_restarts":
        cycle = s.get("num_cycles", 1) * progress % 1.0
        share = 0.5 * (1.0 + math.cos(math.pi * cycle)) if progress < 1.0 else 0.0
    else:
        share = max(0.0, 1.0 - progress) ** s.get("power", 1.0)
    return floor + max(0.0, share) * (peak - floor)
