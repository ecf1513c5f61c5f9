"""Before a run: a learning rate to begin with, and the largest batch that fits into memory. Nothing is written."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pyrformer.checkpoint import parsed_size
from pyrformer.errors import ConfigError
from pyrformer.fields import checked
from pyrformer.training.comm import Alone
from pyrformer.training.trainer import Event, TrainConfig, Trainer

#: How far the smoothed loss may rise above its lowest before a search ends, and how much of it each update keeps.
DIVERGED, SMOOTHING = 1.5, 0.9
#: No batch has more rows.
MOST_ROWS = 1 << 16


@dataclass(frozen=True)
class RateSearch:
    """What updates with growing learning rates did.

    Attributes:
        rates: learning rate of each update.
        losses: the loss before it, smoothed; nats per label.
        suggestion: the rate at which the smoothed loss fell fastest per decade, a peak to try.
    """

    rates: list[float]
    losses: list[float]
    suggestion: float


@checked("find-lr")
def find_learning_rate(
    config: TrainConfig,
    *,
    low: float = 1e-6,
    high: float = 1.0,
    updates: int = 100,
    on_event: Event | None = None,
) -> RateSearch:
    """Makes updates with rates that grow by the same factor from ``low`` to ``high``, until the loss leaves its lowest.

    Source: Smith 2017, "Cyclical Learning Rates for Training Neural Networks", section 3.3.

    Raises:
        ConfigError: the rates or their number make no search, or nothing was learnt at any rate.
    """
    if not (0 < low < high < math.inf and updates >= 10):
        raise ConfigError("[find-lr] give 0 < low < high and at least 10 updates")
    rates: list[float] = []
    losses: list[float] = []
    average = 0.0
    with _trainer(config, on_event) as trainer:
        for step in range(updates):
            rate = low * (high / low) ** (step / (updates - 1))
            begun = trainer.updates.begin(step, rate, trainer.updates.scale)
            numbers = begun.numbers()
            loss = float(numbers["loss"])
            trainer.updates.rescale(begun, numbers["grad_norm"])
            average = SMOOTHING * average + (1.0 - SMOOTHING) * loss
            smooth = average / (1.0 - SMOOTHING ** (step + 1))
            if not math.isfinite(smooth) or (losses and smooth > DIVERGED * min(losses)):
                break
            rates.append(rate)
            losses.append(smooth)
    lowest = int(np.argmin(losses)) if losses else 0
    if lowest < 2:
        raise ConfigError(f"[find-lr] the loss does not fall at any rate from {low:g} on; give a lower one")
    return RateSearch(rates, losses, rates[int(np.argmin(np.gradient(losses[: lowest + 1])))])


def find_batch_size(config: TrainConfig, memory: str, on_event: Event | None = None) -> tuple[int, int]:
    """The most rows in a batch with which weights, optimizer and an update's work memory stay within ``memory``, such
    as "2GB", and the bytes that they take, by the plan's own figures.

    Raises:
        ConfigError: one row takes more.
    """
    budget = parsed_size(memory, "[find-batch-size] memory")
    with _trainer(dataclasses.replace(config, memory=""), on_event) as trainer:
        return _most_rows(trainer, budget)


def _most_rows(trainer: Trainer, budget: int) -> tuple[int, int]:
    passes, batch = trainer.updates.passes, trainer.batches.ready(0)

    def fits(rows: int) -> bool:
        return passes.predicted_bytes(batch, rows) <= budget

    if not fits(1):
        needed = passes.predicted_bytes(batch, 1) / 1e6
        raise ConfigError(
            f"[find-batch-size] one row takes {needed:,.0f} MB; lower seq_len or the model's sizes"
        )
    good, bad = 1, 2
    while bad <= MOST_ROWS and fits(bad):
        good, bad = bad, 2 * bad
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good, passes.predicted_bytes(batch, good)


@contextmanager
def _trainer(config: TrainConfig, on_event: Event | None) -> Iterator[Trainer]:
    with tempfile.TemporaryDirectory() as folder:
        nowhere = dataclasses.replace(config, out=str(Path(folder) / "run"), resume=False, overwrite=False)
        trainer = Trainer(nowhere, on_event or (lambda _kind, _numbers: None), (), Alone())
        with closing(trainer.place):
            yield trainer
