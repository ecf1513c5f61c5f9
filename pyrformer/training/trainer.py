"""Training: from text files to a run folder in Hugging Face's layout.

A run folder holds ``config.json``, ``model.safetensors``, ``tokenizer.json`` and ``tokenizer_config.json``,
``generation_config.json`` (the model of the last checkpoint), ``training.json`` (all options), ``metrics.jsonl`` (a
line per log step), ``samples.jsonl`` (texts by the model, if asked for), ``tokens`` (the text, prepared; see
:mod:`pyrformer.training.tokens`), ``checkpoint-500`` … (all that is needed to go on; see
:mod:`pyrformer.training.checkpoints`) and, where an update was not finite, ``failed-step-7`` (see
:mod:`pyrformer.training.failure`).
The batch of a step is a pure function of (seed, step), so going on gives the bits that a straight run gives.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import signal
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NoReturn

from pyrformer import programs
from pyrformer.batch import Batch
from pyrformer.checkpoint import CONFIG, read_json, write_json
from pyrformer.doctor import environment
from pyrformer.errors import ConfigError, DeviceError, Error, FileError, NonFiniteError, Stopped
from pyrformer.executors import check_device
from pyrformer.fields import checked
from pyrformer.model import Model
from pyrformer.models import build
from pyrformer.optimizers import AVERAGES
from pyrformer.tokenizers import Tokenizer
from pyrformer.training.checkpoints import Checkpoints, Snapshot, read_state
from pyrformer.training.comm import Comm, Mpi, share, world
from pyrformer.training.config import OBJECTIVES, TrainConfig, seconds, steps_or_seconds
from pyrformer.training.failure import Failure, look, rows_of
from pyrformer.training.folder import METRICS, OPTIONS, SAMPLES
from pyrformer.training.initial import apply_changes, check_model, initial_model
from pyrformer.training.measuring import Measuring
from pyrformer.training.opening import first_step, open_folder
from pyrformer.training.rows import Callback, Callbacks, Metrics, Rows
from pyrformer.training.sampling import check_prompts, samples
from pyrformer.training.sharing import moments
from pyrformer.training.signals import Signals
from pyrformer.training.source import Source
from pyrformer.training.tensorboard import FOLDER, TensorBoard
from pyrformer.training.tokens import Interrupted, Place, counted
from pyrformer.training.updates import Begun, Updates
from pyrformer.training.watch import Clock, Spikes, resident_bytes

__all__ = ["OBJECTIVES", "Callback", "Event", "Run", "TrainConfig", "train"]

#: What happens, as ``on_event`` sees it: "stage", "note", "start", "step", "eval", "sample", "save" or "end", and its
#: numbers.
Event = Callable[[str, dict[str, Any]], None]

#: Updates left out in a row, or rollbacks to one and the same checkpoint, after which a run stops.
MOST_LEFT_OUT = 5
#: Tokens of an update: its batches are held together, for their labels are counted first.
MOST_UPDATE = 1 << 28


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: where it is; ``pyrformer.load(folder)`` opens it.
        model: the trained model.
        steps: updates made.
        train_loss: mean of the last 100 losses, nats per label.
        valid_loss: loss over the whole held-out text, nats per label.
        seconds: time spent in updates and their data, evaluation and saving aside.
    """

    folder: Path
    model: Model
    steps: int
    train_loss: float
    valid_loss: float
    seconds: float


@checked("train")
def train(config: TrainConfig, on_event: Event | None = None, callbacks: Sequence[Callback] = ()) -> Run:
    """Trains a model and writes its run folder.

    Started N times by ``mpiexec``, the processes train one model: each computes its share of an update's
    ``gradient_accumulation_steps`` batches; the first one writes and tells. See :mod:`pyrformer.training.comm`.

    Args:
        config: all options.
        on_event: called with what happens, for progress displays.
        callbacks: each gets every row of ``metrics.jsonl``, by ``log(row, step=…)``, and more if it wants to; see
            :class:`Callback`.

    Raises:
        ConfigError, DataError, FileError, TokenizerError: something given is wrong; nothing is left behind then.
        FileError: the disk is full, or a file cannot be written; the checkpoints before are whole.
        NonFiniteError: the loss or the gradient is no finite number; ``RUN/failed-step-N`` holds the update for
            ``pyrformer replay``.
        Stopped: SIGINT or SIGTERM; the state was saved.
        KeyboardInterrupt: one raised by ``on_event`` is passed on after the state was saved.
    """
    comm = world(config.device)
    with comm.ending_together() if isinstance(comm, Mpi) else nullcontext():
        return Trainer(config, on_event or (lambda _kind, _numbers: None), callbacks, comm).run()


class Trainer:
    """One run, or what comes before one; nothing is written until :meth:`run`."""

    def __init__(self, config: TrainConfig, on_event: Event, callbacks: Sequence[Callback], comm: Comm):
        self.comm = comm
        with ExitStack() as undone:
            self._begin(config, on_event, callbacks, undone)
            undone.pop_all()

    def _begin(
        self, config: TrainConfig, on_event: Event, callbacks: Sequence[Callback], undone: ExitStack
    ) -> None:
        """Checks and builds all that the loop needs; what has begun is added to ``undone``."""
        comm, self.leads = self.comm, self.comm.rank == 0
        if config.gradient_accumulation_steps % comm.size:
            raise ConfigError(
                f"[train] {comm.size} processes share the batches of an update: gradient_accumulation_steps "
                f"({config.gradient_accumulation_steps}) must be a multiple of {comm.size}"
            )
        if comm.cores and not config.threads and "PYRFORMER_NUM_THREADS" not in os.environ:
            config = dataclasses.replace(config, threads=comm.cores)
        self.config = config
        board = [TensorBoard(Path(config.out) / FOLDER)] if config.tensorboard else []
        self.callbacks = Callbacks([*callbacks, *board] if self.leads else ())
        self.on_event: Event = on_event if self.leads else lambda _kind, _numbers: None
        self.folder = Path(config.out)
        self.checkpoints = Checkpoints(self.folder, config.save_total_limit)
        self.start = share(comm, lambda: first_step(config, self.checkpoints, self._note))
        check_device(config.device, config.precision)
        if not self.start:
            check_model(config)
        before = self.checkpoints.path(self.start) if self.start else None
        stage: Callable[[str], None] = lambda what: self.on_event("stage", {"what": what})  # noqa: E731
        self.place = Place(self.folder, comm, exists=self.start > 0)
        undone.callback(self.place.close)
        self.source = Source(config, Tokenizer.load(before) if before else None, stage, self.place)
        self.model = self._model(before)
        seq_len = config.seq_len or self.model.family.max_positions
        if seq_len > self.model.family.max_positions:
            most = self.model.family.max_positions
            raise ConfigError(f"[train] seq_len ({seq_len}) is more than the model's {most} positions")
        tokens = seq_len * config.batch_size * config.gradient_accumulation_steps
        if tokens > MOST_UPDATE:
            raise ConfigError(
                f"[train] seq_len × batch_size × gradient_accumulation_steps is {tokens} tokens an update, more than "
                f"{MOST_UPDATE}; lower one of the three"
            )
        self.seq_len = seq_len
        self.batches, self.evaluation, self.data = self.source.batches(seq_len)
        first = self.start * config.gradient_accumulation_steps
        share(comm, lambda: (self.batches.ready(first), None)[1])
        self.updates = Updates(config, comm, self.model, self.batches)
        self.measuring = Measuring(config, self.updates, self.evaluation)
        self._check_groups()
        check_prompts(self.model, config.sample_prompts, config.objective)
        #: Updates in the newest checkpoint, and when it was begun.
        self.saved, self.saved_at = self.start, 0.0
        #: Whether waiting and measuring are to end; what is to be raised once all is saved.
        self.interrupted: Callable[[], bool] = lambda: False
        self.interrupt: KeyboardInterrupt | None = None
        #: Updates left out since one was made, or rollbacks; and the last update that was made.
        self.lost, self.made = 0, -1
        self._set_state({})
        if before:
            self._restore(self.start)
        if what := self.updates.passes.predict(self._first_batch):
            self._note(what)
        if not before:
            # Once: what a checkpoint holds has come of it.
            self.updates.first()
        if not before and config.ema_decay > 0:
            for name in self.updates.mine():
                self.model.store.set(AVERAGES + name, self.model.store.get(name))

    def _note(self, what: str) -> None:
        self.on_event("note", {"what": what})

    def _first_batch(self) -> Batch:
        """The first batch of the next update."""
        return self.batches.ready(self.updates.batches_of(self.step)[0])

    def _model(self, before: Path | None) -> Model:
        c, tokenizer = self.config, self.source.tokenizer
        if before is None:
            return initial_model(c, tokenizer, self.source.labels)
        family = build(read_json(before / CONFIG))
        model = Model(family, tokenizer, threads=c.threads or None, device=c.device, precision=c.precision)
        apply_changes(model, c)
        return model

    def _check_groups(self) -> None:
        names = [p.name for p in programs.trainable(self.model.family)]
        for pattern in self.config.weight_decay_groups:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ConfigError(
                    f"[train] weight_decay_groups: no parameter matches {pattern!r}; the first is {names[0]!r}"
                )

    def _counted(self) -> dict[str, int]:
        return counted(self.batches, self.evaluation)

    def _facts(self) -> dict[str, Any]:
        """What ``training.json`` holds: all options, the text, the machine."""
        c = self.config
        data = {**self.data, **self._counted()}
        return {**dataclasses.asdict(c), "data": data, "environment": environment(c.device)}

    def _open_folder(self) -> None:
        open_folder(self.checkpoints, self.start, self.model, self._facts(), self.place)

    def run(self) -> Run:
        """The run, to its end."""
        if self.comm.size == 1 and self.step < self.config.max_steps:
            try:
                self.updates.passes.make(self._first_batch())
            except BaseException:
                self.place.close()
                raise
        try:
            share(self.comm, self._open_folder)
            self.place.moved(self.folder)
            with ExitStack() as files:
                if self.leads:
                    self.metrics = Metrics(self.folder / METRICS, self.start)
                    files.callback(self.metrics.close)
                    if self.config.sample_prompts:
                        self.samples = Rows(self.folder / SAMPLES, self.start)
                        files.callback(self.samples.close)
                try:
                    return self._loop()
                finally:
                    self.place.close()
                    self.checkpoints.join()
        except OSError as e:
            self._discard()
            said = str(e) if isinstance(e, FileError) else f"[train] {self.folder}: {e.strerror or e}"
            if steps := self.checkpoints.steps():
                said += f"; once that is mended, --resume goes on from step {steps[-1]}"
            raise FileError(said) from None
        except Error as e:
            self._discard()
            if isinstance(e, DeviceError) and (steps := self.checkpoints.steps()):
                raise DeviceError(f"{e}; --resume goes on from step {steps[-1]}") from None
            raise

    def _discard(self) -> None:
        """Removes a run folder in which no update was made."""
        self.place.close()
        if self.leads and self.step == 0 and not self.checkpoints.steps():
            shutil.rmtree(self.folder, ignore_errors=True)

    # -- State ------------------------------------------------------------------------------------------------------

    def _set_state(self, state: dict[str, Any]) -> None:
        """Sets what changes from step to step beside weights and moments, from a checkpoint's or for a new run."""
        self.step = int(state.get("step", 0))
        #: Seconds that training waited for checkpoints.
        self.stall = float(state.get("save_stall_seconds", 0.0))
        self.recent: deque[float] = deque(state.get("recent", []), maxlen=100)
        self.measuring.set_state(state)
        self.updates.set_state(state)
        watched = state.get("spikes", {})
        self.spikes = {name: Spikes(*watched.get(name, ())) for name in ("loss", "grad_norm")}

    def _state(self) -> dict[str, Any]:
        return {
            **self.updates.state(),
            "save_stall_seconds": self.stall,
            "config": self.config.comparable(),
            "data": self.data,
            "recent": list(self.recent),
            **self.measuring.state(),
            "spikes": {name: [list(s.values), s.count] for name, s in self.spikes.items()},
        }

    def _restore(self, step: int) -> None:
        state = read_state(self.checkpoints.path(step))
        if state["data"] != self.data:
            raise ConfigError(
                f"[train] {self.folder} was trained on another text than {', '.join(self.config.files)} holds; "
                "use the same to resume"
            )
        self._load(step)
        self._set_state(state)

    def _load(self, step: int) -> None:
        """Sets the weights, and the states of the parameters that this process updates, from a checkpoint."""
        sharing = self.updates.sharing
        self.checkpoints.load(step, self.model, sharing.mine if sharing else lambda _: True)

    def _save(self) -> None:
        """Begins to write a checkpoint of this step, unless it is there."""
        if self.saved == self.step:
            return
        began = time.perf_counter()
        store, sharing = self.model.store, self.updates.sharing
        found = sharing.states(self.model) if sharing else {n: store.get(n) for n in moments(self.model)}
        self.saved, self.saved_at = self.step, time.monotonic()
        if not self.leads:
            return
        self.checkpoints.wait()
        snapshot = Snapshot(self.step, self.model.state_dict(), dict(sorted(found.items())), self._state())
        keep = self.measuring.best_step if self.config.load_best_model_at_end else 0
        self.checkpoints.save(snapshot, self.model, keep, self._sync)
        self.saved_at = time.monotonic()
        self.stall += time.perf_counter() - began
        self.on_event("save", {"step": self.step, "folder": str(self.checkpoints.path(self.step))})

    def _sync(self) -> None:
        """Flushes what must not be younger than a checkpoint."""
        self.metrics.sync()
        if self.config.sample_prompts:
            self.samples.sync()

    # -- The loop ---------------------------------------------------------------------------------------------------

    def _loop(self) -> Run:
        c = self.config
        departure = self.model.family.config.departure
        if departure:
            self._note(f"note: {departure}; transformers opens the run, but computes something else")
        self.on_event(
            "start",
            {
                "steps": c.max_steps,
                "done": self.step,
                "parameters": self.model.parameter_count,
                "vocab_size": self.source.tokenizer.vocab_size,
                "tokens_per_step": c.batch_size * self.seq_len * c.gradient_accumulation_steps,
                **self.data,
                **self._counted(),
            },
        )
        self.told = bool(self._counted())
        began = self.saved_at = time.monotonic()
        self.clock = Clock()
        self.every, self.pause = steps_or_seconds(c.save_every)
        self.end = began + seconds(c.max_time) if c.max_time else math.inf
        over = False
        with Signals() as signals:
            if self.comm.size == 1:
                # Signals differ between processes, which must do the same.
                self.interrupted = lambda: bool(signals.first)
                self.source.wait_until(self.interrupted)
            if self.start:
                # What a signal kept from being done.
                with suppress(Interrupted):
                    self._look()
            while self.step < c.max_steps and not over and not self.measuring.stalled:
                with suppress(Interrupted):
                    if not self._update():
                        continue
                    self._look()
                if not self.updates.ahead:
                    # Signals and clocks differ between processes; all go by the first that has something.
                    told, ended, due = zip(*self.comm.gather(self._asked(signals.first)), strict=True)
                    over = any(ended)
                    if (self.step % self.every == 0 if self.every else any(due)) and self.step < c.max_steps:
                        self._save()
                    if any(told) and self.interrupt is None:
                        self.interrupt = Stopped(next(filter(None, told)), self.step, self.folder)
                    if self.interrupt is not None:
                        self._stop(self.interrupt)
                self.checkpoints.raise_failure()
                self._tell_saved()
            if over and self.step < c.max_steps:
                # Saved first: measuring may take long, and is no part of what the run goes on from.
                self._save()
                self._note(f"step {self.step}: {c.max_time} are over; {self.folder} goes on with --resume")
            try:
                valid_loss = self._evaluate()
            except Interrupted:
                self._stop(Stopped(signals.first, self.step, self.folder))
            self._sample()
            self._save()
            self.checkpoints.wait()
            self._tell_saved()
            best = self.measuring.best_step
            if c.load_best_model_at_end and best not in (0, self.step):
                share(self.comm, lambda: None)  # the checkpoint is on disk
                self._load(best)
                self.measuring.exchange()
                if self.leads:
                    self.model.save(self.folder)
                valid_loss = self.measuring.best
            else:
                self.measuring.exchange()
        train_loss = statistics.fmean(self.recent) if self.recent else math.nan
        run = Run(self.folder, self.model, self.step, train_loss, valid_loss, self.updates.seconds)
        numbers = {
            "train_loss": train_loss,
            "valid_loss": valid_loss,
            "seconds": self.updates.seconds,
            "steps": self.step,
            "save_stall_seconds": self.stall,
        }
        self.callbacks.tell("end", numbers)
        self.on_event("end", numbers)
        return run

    def _stop(self, interrupt: KeyboardInterrupt) -> NoReturn:
        """Ends the run early, saved."""
        self._save()
        self.checkpoints.wait()
        raise interrupt

    def _asked(self, told: int) -> tuple[int, bool, bool]:
        """A signal that came, ``told`` or one by ``on_event``, or 0; whether the time is over; whether a checkpoint is
        due by the clock."""
        now = time.monotonic()
        late = bool(self.pause) and now - self.saved_at >= self.pause
        return told or (signal.SIGINT if self.interrupt else 0), now >= self.end, late

    def _busy(self, step: int) -> bool:
        """Whether something is to be done behind the update of a step, counted from 1, before the next is begun."""
        c = self.config
        counts = (c.eval_every, c.sample_every, self.every)
        return any(n and step % n == 0 for n in counts) or any(self._asked(self.interrupted()))

    def _look(self) -> None:
        """Evaluates and samples where that is due after an update, unless it was done."""
        c, step = self.config, self.step
        if step == c.max_steps:
            return
        if c.eval_every and step % c.eval_every == 0 and step > self.measuring.judged:
            self._evaluate()
        if c.sample_every and step % c.sample_every == 0:
            self._sample()

    def _update(self) -> bool:
        """One update, and its row; False where there is none, for it was not finite."""
        c = self.config
        if self.step in self.updates.left_out:
            self.step += 1
            return False
        begun = self.updates.next(self.step, self._busy)
        numbers = begun.numbers()
        loss, norm = numbers["loss"], numbers["grad_norm"]
        if what := self.updates.rescale(begun, norm):
            self.step += 1
            self._note(what)
            return True
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._nonfinite(begun, loss, norm)
            return False
        if c.on_nonfinite == "skip":
            self.lost = 0
        self.made = self.step
        self.step += 1
        self.recent.append(loss)
        for name, spikes in self.spikes.items():
            if spikes.add(numbers[name]):
                self._note(f"step {self.step}: {name} {numbers[name]:.4g} is a spike")
        if begun.ratio:
            numbers |= {
                "update_ratio": begun.ratio(),
                "loss_spikes": self.spikes["loss"].count,
                "grad_norm_spikes": self.spikes["grad_norm"].count,
                "rss_bytes": resident_bytes(),
                "utilisation": self.clock.utilisation(),
                "save_stall_seconds": self.stall,
            }
        numbers = {"step": self.step, **numbers}
        if begun.ratio:
            self._log(numbers)
        try:
            self.on_event("step", numbers)
        except KeyboardInterrupt as e:
            self.interrupt = e
        return True

    def _nonfinite(self, begun: Begun, loss: float, norm: float) -> None:
        """Keeps the update and says where it fails; then stops, leaves it out, or goes back and leaves it out."""
        c, bad, updates = self.config, self.step, self.updates
        if not math.isfinite(norm):
            updates.drop()
        updates.passes.clear()
        what = f"step {bad + 1}: the loss is {loss} and the gradient norm {norm}"
        if begun.scale is not None:
            what += f" at loss scale {begun.scale.value:,g}" + (", the least" if begun.scale.least else "")

        def kept() -> tuple[str, int | None, bool]:
            numbers = {"loss": repr(loss), "grad_norm": repr(norm), "left_out": sorted(updates.left_out)}
            said, before = look(what, self.folder, updates.passes, self._failure(begun), numbers)
            with suppress(NonFiniteError):  # a checkpoint of weights that are spoiled already
                self.checkpoints.wait()
            return said, self.checkpoints.newest()[0], before

        what, newest, before = share(self.comm, kept)
        skips = c.on_nonfinite == "skip" and not before
        if before:
            bad = self.made  # the update that spoiled the weights, with finite loss and gradient
        if c.on_nonfinite == "stop" or self.lost == MOST_LEFT_OUT or (newest is None and not skips):
            raise NonFiniteError(
                f"[train] {what}; lower learning_rate or raise warmup_steps; `pyrformer replay` makes the update again"
            )
        self.lost += 1
        left_out = updates.left_out | {bad}
        if not skips and newest is not None:
            updates.drop()
            self._restore(newest)
            self.saved = -1
            if self.leads:
                self.metrics.cut(newest)
                if c.sample_prompts:
                    self.samples.cut(newest)
            what = f"{what}; back to step {newest}"
        updates.left_out = left_out
        self._note(f"{what}; going on without update {bad + 1}")

    def _failure(self, begun: Begun) -> Failure:
        """All that an update is made of."""
        update, batches = self.updates.parts(begun)
        rows = []
        for i, (draw, batch) in enumerate(batches):
            documents = [[*map(self.source.number, row)] for row in self.batches.documents(draw)]
            rows += [{"batch": i, **row} for row in rows_of(self.source.tokenizer, batch, documents)]
        return Failure(update, batches, rows)

    def _evaluate(self) -> float:
        """Measures the loss over the whole held-out text, and tells of it; once for each step.

        Raises:
            Interrupted: a signal came.
        """
        measuring = self.measuring
        if measuring.measured[0] != self.step:
            numbers = measuring.measure(self.step, self.interrupted)
            self._log(numbers)
            self._tell_counted()
            self.callbacks.tell("evaluate", self.step, numbers)
            self.on_event("eval", numbers)
            if measuring.judge():
                used = measuring.patience_used
                self._note(f"step {self.step}: no better held-out loss in {used} evaluations; stopping")
            if measuring.improved() and self.config.load_best_model_at_end:
                self._save()
        return measuring.measured[1]

    def _tell_counted(self) -> None:
        """Says how many tokens the text has, once that is known."""
        if self.told or not (found := self._counted()):
            return
        self.told = True
        known = {name.removesuffix("_tokens"): f"{count:,}" for name, count in found.items()}
        what = f"{known['train']} tokens to learn from"
        if "valid" in known:
            what += f", {known['valid']} held out"
        self._note(f"all text is tokenized: {what}")
        if self.leads:
            write_json(self.folder / OPTIONS, self._facts())

    def _log(self, row: dict[str, Any]) -> None:
        """Writes a row of figures, unless it is an evaluation that is there."""
        if self.leads and not self.metrics.known(row):
            self.metrics.write(row)
            self.callbacks.log(row)

    def _sample(self) -> None:
        """Writes what the model makes of the prompts."""
        prompts = self.config.sample_prompts
        if not prompts or share(self.comm, lambda: self.step in self.samples.steps):
            return
        with self.measuring.averages():
            texts = samples(self.model, prompts, self.config.seed) if self.leads else []
        if not self.leads:
            return
        made = [{"prompt": p, "text": t} for p, t in zip(prompts, texts, strict=True)]
        for one in made:
            self.samples.write({"step": self.step, **one})
        self.callbacks.tell("sample", self.step, made)
        self.on_event("sample", {"step": self.step, "samples": made})

    def _tell_saved(self) -> None:
        """Tells of the checkpoints that are on disk since the last call."""
        while self.checkpoints.written:
            step = self.checkpoints.written.popleft()
            self.callbacks.tell("save", step, self.checkpoints.path(step))
