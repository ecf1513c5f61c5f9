"""The updates of a run: each over its batches, by all processes, on a device one ahead of the loss that is read.

A device goes on with an update by itself. So the next one is begun behind it, and waits for nothing while the loss of
the one before is read, logged and looked at. Where that is not finite, what was begun behind it changes nothing, is
dropped, and is begun again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import zip_longest
from typing import Any, NoReturn

import numpy as np

from pyrformer import programs
from pyrformer.batch import Batch
from pyrformer.compile import Compiled
from pyrformer.errors import Error
from pyrformer.executors import AnyRun, Ended
from pyrformer.model import Model
from pyrformer.training.comm import Comm
from pyrformer.training.config import TrainConfig
from pyrformer.training.loss_scale import LossScale
from pyrformer.training.passes import GRADIENT, SUM, Passes, Update
from pyrformer.training.sharing import Sharing
from pyrformer.training.source import AnyBatches
from pyrformer.training.tokens import Interrupted
from pyrformer.training.watch import UpdateRatio


@dataclass(frozen=True)
class Begun:
    """An update that was begun.

    Attributes:
        step: its number from 0.
        scale: that of its loss; None: losses are not scaled.
        under_way: whether a device goes on with it by itself.
        numbers: waits for it and gives its numbers, the gradient's as if it were not scaled; raises what kept it from
            being begun.
        ratio: for updates that are logged, waits for it and gives ‖change‖ / ‖weights‖.
    """

    step: int
    scale: LossScale | None
    under_way: bool
    numbers: Callable[[], dict[str, Any]]
    ratio: Callable[[], float] | None = None


class Updates:
    """The updates of a run.

    Attributes:
        passes: their programs.
        sharing: this process's share of them, where there are others.
        seconds: time spent in them and their data.
        left_out: those that are not made.
        scale: that of the next one's loss; None: losses are not scaled.
    """

    def __init__(self, config: TrainConfig, comm: Comm, model: Model, batches: AnyBatches):
        self.config, self.comm, self.model, self.batches = config, comm, model, batches
        self.sharing: Sharing | None = None
        if comm.size > 1:
            self.sharing = Sharing(comm, {p.name: p.shape for p in programs.trainable(model.family)})
        self.set_state({})
        owned = self.sharing.owned if self.sharing else None
        self.passes = Passes(model, config, owned=owned, scaled=self.scale is not None)
        self._ratio = UpdateRatio(model)
        self._ahead: Begun | None = None

    def set_state(self, state: dict[str, Any]) -> None:
        """Sets what a checkpoint holds, or a new run begins with."""
        self.seconds = float(state.get("seconds", 0.0))
        self.left_out: set[int] = set(state.get("left_out", []))
        self.scale = LossScale(**state["loss_scale"]) if "loss_scale" in state else first_scale(self.config)

    def state(self) -> dict[str, Any]:
        """For :meth:`set_state`."""
        scale = {} if self.scale is None else {"loss_scale": asdict(self.scale)}
        return {"seconds": self.seconds, "left_out": sorted(self.left_out), **scale}

    @property
    def ahead(self) -> bool:
        """Whether the update behind the one that was waited for is begun."""
        return self._ahead is not None

    def mine(self) -> list[str]:
        """The trained parameters that this process updates: all, where it is alone."""
        names = [p.name for p in programs.trainable(self.model.family)]
        return [n for n in names if n in self.sharing.owned] if self.sharing else names

    def first(self) -> None:
        """Sets all trained parameters to what they are before the first update, in every process."""
        store, optimizer = self.model.store, self.passes.optimizer
        for parameter in programs.trainable(self.model.family):
            value = store.get(parameter.name)
            if (new := optimizer.first(value)) is not value:
                store.set(parameter.name, new)

    def batches_of(self, step: int) -> range:
        """The numbers of the batches of a step, in the run."""
        parts = self.config.gradient_accumulation_steps
        return range(step * parts, (step + 1) * parts)

    # -- One ahead ----------------------------------------------------------------------------------------------------

    def next(self, step: int, busy: Callable[[int], bool]) -> Begun:
        """The update of a step, begun; and so is the one behind it, on a device.

        Args:
            busy: whether something is to be done between an update, given by its number from 1, and the next.
        """
        begun = self._ahead or self._begin_step(step, self.scale)
        self._ahead = self._go_ahead(begun, busy) if begun.under_way else None
        return begun

    def rescale(self, begun: Begun, norm: float) -> str | None:
        """Sets the scale of the next loss, behind an update; says so where this one was left out because its scale was
        too high.

        Args:
            norm: of its gradient.
        """
        finite, scale = math.isfinite(norm), begun.scale
        if scale is None or (scale.least and not finite):
            return None
        self.scale = scale.behind(finite=finite)
        if finite:
            return None
        self.drop()
        self.passes.clear()
        return (
            f"step {begun.step + 1}: the gradient overflows at loss scale {scale.value:,g}; going on without this "
            f"update at {self.scale.value:,g}"
        )

    def drop(self) -> None:
        """Waits for the update that was begun behind one that failed, and forgets it."""
        if self._ahead is not None:
            with suppress(Error):
                self._ahead.numbers()
        self._ahead = None

    def _go_ahead(self, begun: Begun, busy: Callable[[int], bool]) -> Begun | None:
        """Begins the update behind one that is under way, unless something is to be done between the two: as if the
        gradient of the first were finite, for otherwise it is begun again."""
        step = begun.step + 1
        if busy(step):
            return None
        while step in self.left_out:
            step += 1
        if step >= self.config.max_steps:
            return None
        scale = begun.scale and begun.scale.behind(finite=True)
        try:
            return self._begin_step(step, scale)
        except Interrupted:
            return None
        except Exception as e:
            return Begun(step, scale, False, partial(_raise, e))

    def _begin_step(self, step: int, scale: LossScale | None) -> Begun:
        """Begins the update of a step, and the copies that its row needs."""
        every, lr = self.config.log_every, self.config.rate(_done(step, scale))
        if not (self.comm.rank == 0 and every and (step + 1) % every == 0):
            return self.begin(step, lr, scale)
        before = self._ratio.weights()
        begun = self.begin(step, lr, scale)
        after = self._ratio.weights()
        return replace(begun, ratio=lambda: self._ratio.between(before(), after()))

    # -- One update ---------------------------------------------------------------------------------------------------

    def begin(self, step: int, lr: float, scale: LossScale | None) -> Begun:
        """Begins the update of a step: on the CPU, and beside other processes, it is over when this returns."""
        began = time.perf_counter()
        # Batch i is that of process i modulo their number.
        mine = self.batches_of(step)[self.comm.rank :: self.comm.size]
        batches = [self.batches.ready(i) for i in mine]
        loaded = time.perf_counter()
        update = _update(step, lr, self.counts(batches), scale)
        runs: list[AnyRun] = []
        for i, batch in zip(mine, batches, strict=True):
            program, inputs = self.passes.ready(batch, i, update)
            runs.append(self._shared_pass(program, inputs) if self.sharing else program.start(**inputs))
        if self.sharing:
            last: AnyRun = Ended({"grad_norm": np.float32(self._shared_end(update))})
        elif self.passes.several:
            program, inputs = self.passes.end(update)
            last = program.start(**inputs)
        else:
            last = runs[-1]
        took = time.perf_counter() - began
        rows = sum(b.sizes.batch * b.sizes.tokens for b in batches)

        def numbers() -> dict[str, Any]:
            waited = time.perf_counter()
            outputs = [run.result() for run in runs]
            norm = float(last.result()["grad_norm"])
            spent = took + time.perf_counter() - waited
            self.seconds += spent
            losses = [{name: float(out[name]) for name in self.passes.losses} for out in outputs]
            tokens = sum(self.comm.gather(rows))
            return {
                "loss": sum(self.means(losses, update.counts).values()),
                "learning_rate": lr,
                "grad_norm": norm / update.scale,
                **({} if scale is None else {"loss_scale": scale.value}),
                "tokens_per_s": tokens / spent,
                "seconds": self.seconds,
                "loader_wait_seconds": loaded - began,
            }

        return Begun(step, scale, last.under_way, numbers)

    def _shared_pass(self, program: Compiled, inputs: dict[str, Any]) -> Ended:
        """A pass whose gradients are sent to their owners while it goes on; its other outputs."""
        assert self.sharing is not None
        sharing = self.sharing
        out: dict[str, Any] = {}

        def tell(name: str, value: Any) -> None:
            if name.startswith(GRADIENT):
                sharing.add(name.removeprefix(GRADIENT), value)
            else:
                out[name] = value

        program.tell(tell, **inputs)
        sharing.end_round()
        return Ended(out)

    def _shared_end(self, update: Update) -> float:
        """The owners' updates, and everyone's new weights; the norm of the gradient. One that is not finite changes
        nothing anywhere: all have the same norm."""
        assert self.sharing is not None
        sums, norm = self.sharing.take()
        if math.isfinite(norm):
            if sums:
                for name, total in sums.items():
                    self.model.store.set(SUM + name, total)
                program, inputs = self.passes.end(update, norm)
                program(**inputs)
            self.sharing.publish(self.model)
        return norm

    def parts(self, begun: Begun) -> tuple[Update, list[tuple[int, Batch]]]:
        """What an update is made of: all of its batches, with their numbers, and the rest."""
        batches = [(i, self.batches.ready(i)) for i in self.batches_of(begun.step)]
        labels = sum(b.labels for _, b in batches), sum(b.sentence_labels for _, b in batches)
        lr = self.config.rate(_done(begun.step, begun.scale))
        return _update(begun.step, lr, self.passes.counts(*labels), begun.scale), batches

    # -- Losses of all processes --------------------------------------------------------------------------------------

    def counts(self, batches: Sequence[Batch]) -> dict[str, int]:
        """How many labels each loss of all processes' batches is summed over, at least 1."""
        mine = (sum(b.labels for b in batches), sum(b.sentence_labels for b in batches))
        labels, sentences = map(sum, zip(*self.comm.gather(mine), strict=True))
        return self.passes.counts(labels, sentences)

    def means(self, losses: list[dict[str, float]], counts: dict[str, int]) -> dict[str, float]:
        """The means of summed losses, added over all processes' batches in the order of the batches."""
        rounds = zip_longest(*self.comm.gather(losses))
        every = [one for some in rounds for one in some if one is not None]
        return {name: sum(one[name] for one in every) / counts[name] for name in self.passes.losses}


def first_scale(config: TrainConfig) -> LossScale | None:
    """The loss scale that a run begins with; None: its gradients need none."""
    return LossScale() if config.precision == "float16" else None


def _done(step: int, scale: LossScale | None) -> int:
    """How many updates were made before a step, for the optimizer and the learning rate's schedule."""
    return step - (scale.overflows if scale else 0)


def _update(step: int, lr: float, counts: dict[str, int], scale: LossScale | None) -> Update:
    return Update(step, _done(step, scale), lr, counts, scale.value if scale else 1.0)


def _raise(error: Exception) -> NoReturn:
    raise error
