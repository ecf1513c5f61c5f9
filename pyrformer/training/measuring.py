"""What is measured between updates: the loss over the held-out text, the best one so far, and when to stop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from pyrformer import programs
from pyrformer.executors import AnyRun
from pyrformer.optimizers import AVERAGES
from pyrformer.training.config import TrainConfig
from pyrformer.training.source import AnyBatches
from pyrformer.training.tokens import Interrupted
from pyrformer.training.updates import Updates


class Measuring:
    """The measurements of a run; with a running average of the weights, that is what is measured.

    Attributes:
        best, best_step: the lowest loss so far, and the updates made then; 0: none.
        measured: the step that was measured last, and its loss.
        judged: the last step whose loss counted for the patience.
        patience_used: evaluations since the loss was last better.
    """

    def __init__(self, config: TrainConfig, updates: Updates, evaluation: AnyBatches):
        self.config, self.updates, self.evaluation = config, updates, evaluation
        #: Averages in the place of weights that are kept in bfloat16, as they are without rounding.
        self.exact: dict[str, Any] = {}
        self.set_state({})

    def set_state(self, state: dict[str, Any]) -> None:
        """Sets what a checkpoint holds, or a new run begins with."""
        self.best = math.inf if state.get("best") is None else float(state["best"])
        self.best_step = int(state.get("best_step", 0))
        self.measured = -1, math.nan
        self.judged, self.patience_used = int(state.get("judged", 0)), int(state.get("patience_used", 0))

    def state(self) -> dict[str, Any]:
        """For :meth:`set_state`."""
        return {
            "best": self.best if self.best_step else None,
            "best_step": self.best_step,
            "judged": self.judged,
            "patience_used": self.patience_used,
        }

    def measure(self, step: int, interrupted: Callable[[], bool]) -> dict[str, Any]:
        """Measures the loss over the whole held-out text, always the same batches; its row.

        Raises:
            Interrupted: the run is to end.
        """
        updates, model, comm = self.updates, self.updates.model, self.updates.comm
        runs: list[AnyRun] = []
        batches = []
        with self.averages():
            for i in range(comm.rank, self.evaluation.batches_per_pass, comm.size):
                if interrupted():
                    raise Interrupted
                batch = self.evaluation.ready(i)
                make = partial(programs.evaluate, model.family, batch.sizes)
                run = model.program(("evaluate", batch.sizes), make)
                runs.append(run.start(**updates.passes.arrays(batch)))
                batches.append(replace(batch, arrays={}))
        names = updates.passes.losses
        counts = updates.counts(batches)
        means = updates.means([{name: float(run.result()[name]) for name in names} for run in runs], counts)
        self.measured = step, sum(means.values())
        numbers = {"step": step, "valid_loss": self.measured[1], "valid_labels": counts[names[0]]}
        if len(means) > 1:
            numbers |= {f"valid_{name}": mean for name, mean in means.items() if name != "loss"}
        return numbers

    def judge(self) -> bool:
        """Counts the evaluations, one every ``eval_every`` updates, since the loss was last lower than the best by more
        than the threshold; whether the last measurement leaves no patience."""
        c, (step, loss) = self.config, self.measured
        if not c.eval_every or step % c.eval_every or step <= self.judged:
            return False
        self.judged = step
        self.patience_used = 0 if self.best - loss > c.early_stopping_threshold else self.patience_used + 1
        return self.stalled

    def improved(self) -> bool:
        """Whether the last measurement is the best so far; it is, from here on."""
        step, loss = self.measured
        if loss < self.best:
            self.best, self.best_step = loss, step
            return True
        return False

    @property
    def stalled(self) -> bool:
        """Whether the run is to stop, for its loss does not fall any more."""
        return 0 < self.config.early_stopping_patience <= self.patience_used

    @contextmanager
    def averages(self) -> Iterator[None]:
        """The running average of the weights, if there is one, is the model within the block."""
        self.exchange()
        try:
            yield
        finally:
            self.exchange()

    def exchange(self) -> None:
        """Exchanges the weights with their running average, if there is one."""
        if self.config.ema_decay > 0:
            updates, store = self.updates, self.updates.model.store
            narrow = {name for name, dtype, _ in store.types() if dtype == "bfloat16"}
            for name in updates.mine():
                held, other = store.get(name), store.get(AVERAGES + name)
                if name in self.exact:
                    held = self.exact.pop(name)
                elif name in narrow:
                    self.exact[name] = other
                store.set(name, other)
                store.set(AVERAGES + name, held)
            if updates.sharing:
                updates.sharing.publish(updates.model)
