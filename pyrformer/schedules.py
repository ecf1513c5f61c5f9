"""Learning-rate schedules under Hugging Face's names and with their formulas (``transformers/optimization.py``).

``step`` counts updates from 0; with a warm-up, the rate of update 0 is 0.
"""

from __future__ import annotations

import math

from pyrformer.errors import ConfigError

#: Names, as Hugging Face's ``lr_scheduler_type`` has them, and the settings that each takes.
SCHEDULES: dict[str, tuple[str, ...]] = {
    "cosine": ("num_cycles",),
    "cosine_with_restarts": ("num_cycles",),
    "linear": (),
    "polynomial": ("power",),
    "inverse_sqrt": ("timescale",),
    "warmup_stable_decay": ("num_decay_steps",),
    "constant": (),
    "constant_with_warmup": (),
}


def check_settings(kind: str, settings: dict[str, float]) -> None:
    """Raises ConfigError unless ``settings`` are positive numbers that the schedule ``kind`` takes."""
    for name, value in settings.items():
        if name not in SCHEDULES[kind]:
            raise ConfigError(
                f"[train] a {kind} schedule has no setting {name!r}; it takes {SCHEDULES[kind]}"
            )
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
    settings: dict[str, float] | None = None,
) -> float:
    """The rate of update ``step``: step / warmup_steps of the peak while warming up, then down to the floor.

    Args:
        kind: "cosine" (``num_cycles`` of a wave, 0.5), "cosine_with_restarts" (``num_cycles`` half waves, 1),
            "linear", "polynomial" (``power``, 1), "inverse_sqrt" (√(timescale / step); ``timescale``: the warm-up, or
            10000; it knows no floor), "warmup_stable_decay" (at the peak until a half wave over the last
            ``num_decay_steps``, a tenth of all), "constant" and "constant_with_warmup".
    """
    s = settings or {}
    if kind == "constant":
        return peak
    if step < warmup_steps:
        start = floor if kind == "warmup_stable_decay" else 0.0
        return start + (peak - start) * (step / warmup_steps)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if kind == "constant_with_warmup":
        return peak
    if kind == "inverse_sqrt":
        timescale = s.get("timescale", warmup_steps or 10_000)
        return peak / math.sqrt((step + timescale - warmup_steps) / timescale)
    if kind == "cosine":
        share = 0.5 * (1.0 + math.cos(2.0 * math.pi * s.get("num_cycles", 0.5) * progress))
    elif kind == "cosine_with_restarts":
        cycle = s.get("num_cycles", 1) * progress % 1.0
        share = 0.5 * (1.0 + math.cos(math.pi * cycle)) if progress < 1.0 else 0.0
    elif kind == "warmup_stable_decay":
        decay = s.get("num_decay_steps", max(1, total_steps // 10))
        into = min(1.0, max(0.0, (step - total_steps + decay) / decay))
        share = 0.5 * (1.0 + math.cos(math.pi * into))
    else:
        share = max(0.0, 1.0 - progress) ** s.get("power", 1.0)
    return floor + max(0.0, share) * (peak - floor)
