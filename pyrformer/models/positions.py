"""Where a token stands, as numbers: sinusoids, rotary frequencies with their scalings, ALiBi slopes.

Letters: D head width, H heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pyrformer.errors import ConfigError


def sinusoids(positions: int, width: int) -> npt.NDArray[np.float32]:
    """The position table ``[positions, width]``: sin in even columns, cos in odd ones, wavelengths from 2π to
    10000·2π. Source: Vaswani et al. 2017, section 3.5."""
    angle = np.arange(positions)[:, None] / 10000.0 ** (np.arange(0, width, 2) / width)
    return np.stack([np.sin(angle), np.cos(angle)], axis=-1).reshape(positions, width).astype(np.float32)


def alibi_slopes(heads: int) -> list[float]:
    """One slope a head: 2^(−8k/m), k = 1 … m, for the largest power of two m ≤ ``heads``, and every second one of the
    sequence for 2m for the rest. Source: Press et al. 2022, section 3 and its reference implementation."""
    m = 1 << (heads.bit_length() - 1)
    first = [2.0 ** (-8 * (k + 1) / m) for k in range(m)]
    return first + [2.0 ** (-4 * (2 * k + 1) / m) for k in range(heads - m)]


#: The greatest number among the parameters.
MOST_NUMBER = 1e18
#: Columns of a head that may turn; a damaged number would take all memory.
MOST_COLUMNS = 1 << 20
#: Parameters that are numbers above 0, and those that may be 0; all far from where floats end.
POSITIVE = (
    "rope_theta",
    "partial_rotary_factor",
    "original_max_position_embeddings",
    "factor",
    "high_freq_factor",
)
NUMBERS = (
    *POSITIVE,
    "low_freq_factor",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
)
#: What each scaling must be told besides ``rope_theta``.
NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor"),
}


def rope_parameters(raw: dict[str, Any]) -> dict[str, Any]:
    """The ``rope_parameters`` of a ``config.json``, from today's key or the older ``rope_theta``, ``rope_scaling``,
    ``rotary_emb_base``, ``rotary_pct``. Values that the file does not give are left out."""
    if isinstance(raw.get("rope_parameters"), dict):
        return dict(raw["rope_parameters"])
    found = {
        "rope_theta": raw.get("rope_theta", raw.get("rotary_emb_base")),
        "partial_rotary_factor": raw.get("partial_rotary_factor", raw.get("rotary_pct")),
        "original_max_position_embeddings": raw.get("original_max_position_embeddings"),
    }
    scaling = dict(raw.get("rope_scaling") or {})
    scaling.setdefault("rope_type", scaling.pop("type", "default"))
    return {**{k: v for k, v in found.items() if v is not None}, **scaling}


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al. 2021): the angle of position p in pair i is p · inv_freq[i].

    Attributes:
        inv_freq: radians a position, R/2 of them, R the columns of a head that turn.
        scale: factor on sines and cosines (YaRN's and LongRoPE's attention factor).
    """

    inv_freq: list[float]
    scale: float = 1.0


def rope(parameters: dict[str, Any], head_dim: int, max_positions: int, length: int, where: str) -> Rope:
    """The frequencies for inputs of ``length`` tokens. Source: transformers' ``modeling_rope_utils.py``.

    Args:
        parameters: ``rope_type`` (see ``NEEDS``), ``rope_theta`` (default 10000), ``partial_rotary_factor`` (default 1)
            and what the type needs.
        head_dim: D.
        max_positions: the configuration's ``max_position_embeddings``.
        length: matters to "dynamic" and "longrope" only, whose angles change where a length is passed.

    Raises:
        ConfigError: the type is unknown, or a parameter is missing or makes no sense.
    """
    kind = parameters.get("rope_type", "default")
    if not isinstance(kind, str) or kind not in NEEDS:
        raise ConfigError(f"[config] {where}: rope_type must be one of {', '.join(NEEDS)}, got {kind!r}")
    missing = [name for name in NEEDS[kind] if parameters.get(name) is None]
    if missing:
        raise ConfigError(f"[config] {where}: rope_type {kind!r} needs {missing[0]}")
    p = {name: value for name, value in parameters.items() if value is not None}
    for name in NUMBERS:
        _check_number(p, name, where)
    theta = float(p.get("rope_theta", 10000.0))
    turning = int(head_dim * p.get("partial_rotary_factor", 1.0))
    if turning < 2 or turning % 2 or turning > min(head_dim, MOST_COLUMNS):
        raise ConfigError(
            f"[config] {where}: {turning} of {head_dim} columns of a head would turn; "
            f"the number must be even, from 2 to {MOST_COLUMNS}"
        )
    before = int(p.get("original_max_position_embeddings", max_positions))
    if kind == "longrope":
        factors = p["long_factor" if length > before else "short_factor"]
        if not isinstance(factors, list) or len(factors) != turning // 2:
            raise ConfigError(f"[config] {where}: longrope needs {turning // 2} factors for a head")
    exponent = np.arange(0, turning, 2) / turning
    plain = theta**-exponent
    scale = 1.0
    try:
        with np.errstate(all="ignore"):
            if kind == "linear":
                plain = plain / p["factor"]
            elif kind == "dynamic":
                stretch = p["factor"] * max(length, max_positions) / max_positions - (p["factor"] - 1)
                plain = (theta * stretch ** (turning / (turning - 2))) ** -exponent
            elif kind == "llama3":
                plain = _llama3(plain, p, before)
            elif kind == "yarn":
                plain, scale = _yarn(plain, p, turning, theta, max_positions, before)
            elif kind == "longrope":
                plain = plain / np.array(factors, np.float64)
                scale = _longrope_scale(p, max_positions / before, before)
    except (ArithmeticError, ValueError, TypeError):
        scale = math.nan
    if not (np.isfinite(plain).all() and math.isfinite(scale)):
        raise ConfigError(f"[config] {where}: these rope_parameters give no finite angles: {p}")
    return Rope([float(f) for f in plain], scale)


def _check_number(parameters: dict[str, Any], name: str, where: str) -> None:
    value = parameters.get(name, 1.0)
    least = "above 0" if name in POSITIVE else "0 or more"
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (number and 0 <= value <= MOST_NUMBER and (value > 0 or name not in POSITIVE)):
        raise ConfigError(
            f"[config] {where}: {name} must be a number {least}, to {MOST_NUMBER:g}, got {value!r}"
        )


def _llama3(plain: npt.NDArray[np.float64], p: dict[str, Any], before: int) -> npt.NDArray[np.float64]:
    """Long waves are stretched by ``factor``, short ones kept, those between blended."""
    low, high = p["low_freq_factor"], p["high_freq_factor"]
    turns = before * plain / (2 * math.pi)
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    stretched = (1 - blend) * plain / p["factor"]
    return np.asarray(stretched + blend * plain, np.float64)


def _yarn(
    plain: npt.NDArray[np.float64], p: dict[str, Any], turning: int, theta: float, most: int, before: int
) -> tuple[npt.NDArray[np.float64], float]:
    """Peng et al. 2023, section 3: a ramp between stretching and keeping, and a temperature on the logits."""
    factor = p.get("factor") or most / before

    def pair(turns: float) -> float:
        return turning * math.log(before / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(p.get("beta_fast") or 32), pair(p.get("beta_slow") or 1)
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, turning - 1)
    ramp = np.clip((np.arange(turning // 2) - low) / max(high - low, 0.001), 0, 1)
    scale = p.get("attention_factor")
    if scale is None:

        def temperature(m: float) -> float:
            return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0

        m, all_dim = p.get("mscale"), p.get("mscale_all_dim")
        scale = temperature(m) / temperature(all_dim) if m and all_dim else temperature(1.0)
    return plain / factor * ramp + plain * (1 - ramp), float(scale)


def _longrope_scale(p: dict[str, Any], ratio: float, before: int) -> float:
    """Ding et al. 2024, section 3.3: √(1 + ln s / ln L)."""
    if p.get("attention_factor") is not None:
        return float(p["attention_factor"])
    factor = p.get("factor") or ratio
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(before))
