"""The programs of an update and what they are given: passes over batches, and the step of the optimizer behind them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from pyrformer import programs
from pyrformer.batch import Batch
from pyrformer.checkpoint import parsed_size
from pyrformer.compile import Array, Compiled, Lowered, Traced
from pyrformer.executors.program import SIZES, copy_name
from pyrformer.model import Model
from pyrformer.training.config import TrainConfig

#: The losses of objectives that have others than that of tokens.
LOSSES = {"sentence": ("sentence_loss",), "mlm+nsp": ("loss", "sentence_loss")}
#: The states that gradients of several batches are added in.
SUM = "grad_sum."
#: The outputs that are gradients.
GRADIENT = "grad."


@dataclass(frozen=True)
class Update:
    """What an update depends on beside its batches.

    Attributes:
        step: its number in the run, from 0.
        done: updates that the optimizer made before.
        lr: the learning rate.
        counts: how many labels each loss is summed over.
        scale: that of the loss; see :mod:`pyrformer.training.loss_scale`.
    """

    step: int
    done: int
    lr: float
    counts: dict[str, int]
    scale: float = 1.0


class Passes:
    """The passes of a run's updates.

    Attributes:
        scaled: whether losses are.
        losses: the losses whose means are added.
        saving: how programs trade time for memory; keyword arguments of :meth:`pyrformer.compile.Traced.lower`.
    """

    def __init__(
        self,
        model: Model,
        config: TrainConfig,
        *,
        owned: frozenset[str] | None = None,
        scaled: bool = False,
    ):
        """
        Args:
            owned: where other processes compute a part of each update, the parameters that this one updates; gradients
                are outputs then.
        """
        self.model, self.config, self.owned, self.scaled = model, config, owned, scaled
        self.optimizer = config.optimizer()
        self.options = programs.LossOptions(config.label_smoothing_factor, config.z_loss)
        self.losses = LOSSES.get(config.objective, ("loss",))
        self.saving: dict[str, Any] = {}

    @property
    def shared(self) -> bool:
        """Whether other processes compute a part of each update."""
        return self.owned is not None

    @property
    def several(self) -> bool:
        """Whether the optimizer's step is a program of its own, behind passes over several batches."""
        return self.config.gradient_accumulation_steps > 1

    def counts(self, labels: int, sentences: int) -> dict[str, int]:
        """How many labels each loss is summed over, at least 1."""
        return {"loss": max(1, labels), "sentence_loss": max(1, sentences)}

    def trace(self, batch: Batch) -> Traced:
        """The program of one forward and backward pass, with the update where it is the step's only one."""
        family, sizes = self.model.family, batch.sizes
        if not self.several:
            return programs.train_step(
                family, sizes, self.optimizer, options=self.options, scaled=self.scaled
            )
        if self.shared:
            return programs.gradients(family, sizes, options=self.options, training=True)
        return programs.accumulate_step(family, sizes, options=self.options)

    def make(self, batch: Batch) -> None:
        """Makes the programs of an update: raises what they cannot be made for, before anything else is done."""
        self._pass(batch)
        if self.several:
            self._apply()

    def _pass(self, batch: Batch) -> Compiled:
        return self.model.program(("pass", batch.sizes), partial(self.trace, batch), **self.saving)

    def _apply(self) -> Compiled:
        return self.model.program(("apply_step",), self._trace_apply)

    def _trace_apply(self) -> Traced:
        family, optimizer = self.model.family, self.optimizer
        return programs.apply_step(family, optimizer, owned=self.owned, scaled=self.scaled)

    def ready(self, batch: Batch, draw: int, update: Update) -> tuple[Compiled, dict[str, Any]]:
        """The program of a pass, and its inputs.

        Args:
            draw: the batch's number in the run, by which dropout is drawn; that of an update which is one batch, too.
        """
        scales = {programs.SCALES[name]: update.scale / update.counts[name] for name in self.losses}
        inputs: dict[str, Any] = {**self.arrays(batch), **scales}
        program = self._pass(batch)
        if not self.several:
            inputs |= self._rates(program, update)
        return program, inputs | self._random(program, draw)

    def end(self, update: Update, norm: float | None = None) -> tuple[Compiled, dict[str, Any]]:
        """The program of the optimizer's step behind several passes, and its inputs.

        Args:
            norm: of all processes' gradients as they are, scaled, where there are others.
        """
        program = self._apply()
        inputs = self._rates(program, update) | self._random(program, update.step)
        return program, inputs if norm is None else {**inputs, "norm": norm}

    def clear(self) -> None:
        """Sets the sums of gradients to zero, as they are between updates."""
        for name, dtype, shape in self.model.store.types():
            if name.startswith(SUM):
                self.model.store.set(name, np.zeros(shape, dtype))

    def predicted_bytes(self, batch: Batch, rows: int) -> int:
        """The memory that a pass takes, states included, over a batch like this one, but of so many rows."""
        labelled = math.ceil(batch.sizes.labelled * rows / batch.sizes.batch)
        sizes = replace(batch.sizes, batch=rows, labelled=labelled)
        traced, model = self.trace(replace(batch, arrays={}, sizes=sizes)), self.model
        lowered = traced.lower(model.device, precision=model.precision, recompute=self.config.recompute)
        return lowered.bytes + self.apart(lowered)

    def predict(self, batch: Callable[[], Batch]) -> str | None:
        """Sets what is recomputed in passes over batches like this one; what that, and rounding what is kept, saves and
        costs, in words."""
        c, device, precision = self.config, self.model.device, self.model.precision
        rounded = precision != "float32" and device == "cpu"
        if not c.recompute and not c.memory and not rounded:
            return None
        traced = self.trace(batch())
        plain = traced.lower(device, precision="float32" if rounded else precision)
        apart = self.apart(plain)
        memory = max(1, parsed_size(c.memory) - apart) if c.memory else 0
        self.saving = {"recompute": c.recompute, "memory": memory}
        chosen = traced.lower(device, precision=precision, recompute=c.recompute, memory=memory)
        ways, cost = [], ""
        if c.recompute or c.memory:
            ways.append(f"{chosen.recomputed} of {len(plain.graph.layers())} layers recomputed")
            cost = f"; {100 * (chosen.plan.flops / max(1, plain.plan.flops) - 1.0):.1f} % more arithmetic"
        if rounded:
            ways.append("what waits for the backward pass in bfloat16")
        return (
            f"memory: {(chosen.bytes + apart) / 1e6:,.0f} MB predicted with {' and '.join(ways)}, "
            f"{(plain.bytes + apart) / 1e6:,.0f} MB without{cost}"
        )

    def apart(self, lowered: Lowered) -> int:
        """Bytes of the states that a pass does not touch, but the update that follows: they are there, too."""
        if not self.several:
            return 0
        there = {name for name, _, _ in lowered.plan.states}
        apply = self._trace_apply().lower(self.model.device, precision=self.model.precision).plan
        # A weight that is bfloat16 itself is what passes read as a copy.
        return sum(
            SIZES[dtype] * math.prod(shape)
            for name, dtype, shape in apply.states
            if name not in there and not (dtype == "bfloat16" and copy_name(name, dtype) in there)
        )

    def _random(self, program: Compiled, draw: int) -> dict[str, Any]:
        """What a program's draws are keyed by, where it draws: the run's seed, the number of a batch or an update."""
        draws = any(name == "rng" for name, _, _ in program.plan.inputs)
        return {"rng": np.array([self.config.seed, draw], np.uint64).view(np.int32)} if draws else {}

    def _rates(self, program: Compiled, update: Update) -> dict[str, Any]:
        """Those of the optimizer's inputs that a program has: one of several rules may need none of one's."""
        names = {name for name, _, _ in program.plan.inputs}
        given = {
            "lr": update.lr,
            "unscale": 1.0 / update.scale,
            **self.optimizer.inputs(update.done + 1),
        }
        return {name: value for name, value in given.items() if name in names}

    def arrays(self, batch: Batch) -> dict[str, Array]:
        """A batch's arrays as the family takes them: positions from its first row on, types only where it has some."""
        arrays = dict(batch.arrays)
        arrays["position_ids"] = arrays["position_ids"] + np.int32(self.model.family.position_offset)
        unseen = self.model.family.unseen(batch.sizes.tokens) if "hidden" in arrays else None
        if unseen is not None:
            arrays["hidden"] = arrays["hidden"] | unseen
        if not self.model.family.uses_token_types:
            arrays.pop("token_type_ids", None)
        elif "token_type_ids" not in arrays:
            arrays["token_type_ids"] = np.zeros_like(arrays["input_ids"])
        return arrays
