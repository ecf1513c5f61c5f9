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
import json
import math
import os
import shutil
import signal
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from pyrformer import _core, programs
from pyrformer.batch import Batch
from pyrformer.checkpoint import CONFIG, parsed_size, read_json, save_config, write_json
from pyrformer.compile import Compiled
from pyrformer.doctor import environment
from pyrformer.errors import ConfigError, DeviceError, Error, FileError, NonFiniteError, Stopped
from pyrformer.executors import AnyRun, Ended
from pyrformer.fields import checked
from pyrformer.model import Model
from pyrformer.models import build
from pyrformer.optimizers import AVERAGES
from pyrformer.schedules import learning_rate
from pyrformer.tokenizers import Tokenizer
from pyrformer.training.checkpoints import Checkpoints, Snapshot, read_state
from pyrformer.training.comm import Comm, Mpi, share, world
from pyrformer.training.config import OBJECTIVES, TrainConfig, seconds, steps_or_seconds
from pyrformer.training.failure import Failure, examine, keep, rows_of
from pyrformer.training.folder import METRICS, OPTIONS, SAMPLES
from pyrformer.training.initial import apply_changes, check_model, initial_model
from pyrformer.training.passes import GRADIENT, SUM, Passes, Update
from pyrformer.training.rows import Callback, Callbacks, Metrics, Rows
from pyrformer.training.sampling import check_prompts, samples
from pyrformer.training.sharing import Sharing, moments
from pyrformer.training.signals import Signals
from pyrformer.training.source import Source
from pyrformer.training.tensorboard import FOLDER, TensorBoard
from pyrformer.training.tokens import Growing, Interrupted, Place
from pyrformer.training.watch import Clock, Spikes, UpdateRatio, resident_bytes

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


@dataclass(frozen=True)
class Begun:
    """An update that was begun.

    Attributes:
        step: its number from 0.
        under_way: whether a device goes on with it by itself.
        numbers: waits for it and gives its numbers; raises what kept it from being begun.
        ratio: for updates that are logged, waits for it and gives ‖change‖ / ‖weights‖.
    """

    step: int
    under_way: bool
    numbers: Callable[[], dict[str, Any]]
    ratio: Callable[[], float] | None = None


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
        self.start = share(comm, self._prepare_folder)
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
        self.sharing: Sharing | None = None
        if comm.size > 1:
            shapes = {p.name: p.shape for p in programs.trainable(self.model.family)}
            self.sharing = Sharing(comm, shapes)
        self.passes = Passes(self.model, config, owned=self.sharing.owned if self.sharing else None)
        self._check_groups()
        check_prompts(self.model, config.sample_prompts, config.objective)
        self.ratio = UpdateRatio(self.model)
        #: Updates in the newest checkpoint, and when it was begun.
        self.saved, self.saved_at = self.start, 0.0
        #: Whether waiting and measuring are to end; what is to be raised once all is saved.
        self.interrupted: Callable[[], bool] = lambda: False
        self.interrupt: KeyboardInterrupt | None = None
        #: The update behind the one that is waited for, where it was begun.
        self.ahead: Begun | None = None
        #: Updates left out since one was made, or rollbacks; and the last update that was made.
        self.lost, self.made = 0, -1
        self._set_state({})
        if before:
            self._restore(self.start)
        self._predict()
        if not before and config.ema_decay > 0:
            for name in self._mine():
                self.model.store.set(AVERAGES + name, self.model.store.get(name))

    # -- The run folder ---------------------------------------------------------------------------------------------

    def _prepare_folder(self) -> int:
        """Checks the run folder; gives the step of the checkpoint to go on from, or 0."""
        c, folder = self.config, self.folder
        if not folder.exists() or not any(folder.iterdir() if folder.is_dir() else [1]):
            if c.resume:
                raise FileError(f"[train] there is no run at {folder} to resume")
            return 0
        if not folder.is_dir():
            raise FileError(f"[train] {folder} is a file; choose another --out")
        if (c.overwrite or c.resume) and not (folder / OPTIONS).is_file():
            raise FileError(
                f"[train] {folder} is not a run folder, so it is neither overwritten nor resumed; choose another one"
            )
        if c.overwrite:
            return 0
        if not c.resume:
            raise FileError(
                f"[train] {folder} exists; give --resume to go on with it or --overwrite to replace it"
            )
        step, skipped = self.checkpoints.newest()
        for what in skipped:
            self.on_event("note", {"what": f"{what}; skipped"})
        if step is None:
            self.on_event("note", {"what": f"{folder} has no checkpoint yet; starting from step 0"})
            state = {"config": read_json(folder / OPTIONS)}
        else:
            state = read_state(self.checkpoints.path(step))
            self.on_event("note", {"what": f"going on from {self.checkpoints.path(step)}"})
        before, now = state["config"], json.loads(json.dumps(c.comparable()))
        changed = sorted(k for k in now if before.get(k) != now[k])
        if changed:
            raise ConfigError(
                f"[train] {folder} was trained with another {', '.join(changed)}; use the same to resume"
            )
        return step or 0

    def _model(self, before: Path | None) -> Model:
        c, tokenizer = self.config, self.source.tokenizer
        if before is None:
            return initial_model(c, tokenizer, self.source.labels)
        family = build(read_json(before / CONFIG))
        model = Model(family, tokenizer, threads=c.threads or None, device=c.device, bf16=c.bf16)
        apply_changes(model, c)
        return model

    def _open_folder(self) -> None:
        """Makes the folder ready for this run."""
        try:
            if self.start:
                self.checkpoints.clean()
                write_json(self.folder / OPTIONS, self._facts())
            else:
                self._create_folder()
        except OSError as e:
            if isinstance(e, FileError):
                raise
            raise FileError(f"[train] {self.folder}: {e.strerror or e}") from None

    def _check_groups(self) -> None:
        names = [p.name for p in programs.trainable(self.model.family)]
        for pattern in self.config.weight_decay_groups:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ConfigError(
                    f"[train] weight_decay_groups: no parameter matches {pattern!r}; the first is {names[0]!r}"
                )

    def _facts(self) -> dict[str, Any]:
        """What ``training.json`` holds: all options, the text, the machine."""
        c = self.config
        data = {**self.data, **self._counted()}
        return {**dataclasses.asdict(c), "data": data, "environment": environment(c.device)}

    def _counted(self) -> dict[str, int]:
        """How many tokens there are, once all text that was to be tokenized is."""
        both = {"train_tokens": self.batches, "valid_tokens": self.evaluation}
        growing = {name: b for name, b in both.items() if isinstance(b, Growing)}
        if not any(b.known for b in growing.values()):
            return {}
        return {name: b.count() for name, b in growing.items()}

    def _create_folder(self) -> None:
        """Makes the folder of a new run appear at once, with all but weights and numbers."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        if self.folder.is_dir() and any(
            self.folder.iterdir()
        ):  # to be overwritten, or killed before any checkpoint
            aside = self.folder.with_name(f".{self.folder.name}.{os.getpid()}.partial")
            self.folder.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
        directory = _core.AtomicDir(self.folder)
        path = Path(directory.path or "")
        try:
            save_config(self.model, path)
            write_json(path / OPTIONS, self._facts())
            (path / METRICS).touch()
            with self.place.moving(path, self.folder):
                directory.commit(replace=True)
        finally:
            directory.discard()

    def run(self) -> Run:
        if self.comm.size == 1 and self.step < self.config.max_steps:
            try:
                self.passes.make(self.batches.ready(self.step * self.config.gradient_accumulation_steps))
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
        self.step, self.seconds = int(state.get("step", 0)), float(state.get("seconds", 0.0))
        #: Seconds that training waited for checkpoints.
        self.stall = float(state.get("save_stall_seconds", 0.0))
        self.recent: deque[float] = deque(state.get("recent", []), maxlen=100)
        self.best = math.inf if state.get("best") is None else float(state["best"])
        self.best_step = int(state.get("best_step", 0))
        #: The step that was evaluated last, and its loss.
        self.measured = -1, math.nan
        self.judged, self.patience_used = int(state.get("judged", 0)), int(state.get("patience_used", 0))
        self.left_out = set(state.get("left_out", []))
        watched = state.get("spikes", {})
        self.spikes = {name: Spikes(*watched.get(name, ())) for name in ("loss", "grad_norm")}

    def _state(self) -> dict[str, Any]:
        return {
            "seconds": self.seconds,
            "save_stall_seconds": self.stall,
            "config": self.config.comparable(),
            "data": self.data,
            "recent": list(self.recent),
            "best": self.best if self.best_step else None,
            "best_step": self.best_step,
            "judged": self.judged,
            "patience_used": self.patience_used,
            "left_out": sorted(self.left_out),
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

    def _mine(self) -> list[str]:
        """The trained parameters that this process updates: all, where it is alone."""
        names = [p.name for p in programs.trainable(self.model.family)]
        return [n for n in names if n in self.sharing.owned] if self.sharing else names

    def _load(self, step: int) -> None:
        """Sets the weights, and the states of the parameters that this process updates, from a checkpoint."""
        self.checkpoints.load(step, self.model, self.sharing.mine if self.sharing else lambda _: True)

    def _save(self) -> None:
        """Begins to write a checkpoint of this step, unless it is there."""
        if self.saved == self.step:
            return
        began = time.perf_counter()
        store = self.model.store
        found = (
            self.sharing.states(self.model)
            if self.sharing
            else {n: store.get(n) for n in moments(self.model)}
        )
        self.saved, self.saved_at = self.step, time.monotonic()
        if not self.leads:
            return
        self.checkpoints.wait()
        snapshot = Snapshot(self.step, self.model.state_dict(), dict(sorted(found.items())), self._state())
        keep = self.best_step if self.config.load_best_model_at_end else 0
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
            what = f"note: {departure}; transformers opens the run, but computes something else"
            self.on_event("note", {"what": what})
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
            while self.step < c.max_steps and not over and not self._stalled():
                with suppress(Interrupted):
                    numbers = self._update()
                    if numbers is None:
                        continue
                    try:
                        self.on_event("step", numbers)
                    except KeyboardInterrupt as e:
                        self.interrupt = e
                    self._look()
                if self.ahead is None:
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
                what = f"step {self.step}: {c.max_time} are over; {self.folder} goes on with --resume"
                self.on_event("note", {"what": what})
            try:
                valid_loss = self._evaluate()
            except Interrupted:
                self._stop(Stopped(signals.first, self.step, self.folder))
            self._sample()
            self._save()
            self.checkpoints.wait()
            self._tell_saved()
            if c.load_best_model_at_end and self.best_step not in (0, self.step):
                share(self.comm, lambda: None)  # the checkpoint is on disk
                self._load(self.best_step)
                self._exchange()
                if self.leads:
                    self.model.save(self.folder)
                valid_loss = self.best
            else:
                self._exchange()
        train_loss = statistics.fmean(self.recent) if self.recent else math.nan
        run = Run(self.folder, self.model, self.step, train_loss, valid_loss, self.seconds)
        numbers = {
            "train_loss": train_loss,
            "valid_loss": valid_loss,
            "seconds": self.seconds,
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

    def _look(self) -> None:
        """Evaluates and samples where that is due after an update, unless it was done."""
        c, step = self.config, self.step
        if step == c.max_steps:
            return
        if c.eval_every and step % c.eval_every == 0 and step > self.judged:
            self._evaluate()
        if c.sample_every and step % c.sample_every == 0:
            self._sample()

    def _update(self) -> dict[str, Any] | None:
        """One update and its row; None where it was left out."""
        c = self.config
        if self.step in self.left_out:
            self.step += 1
            return None
        begun = self.ahead or self._begin_step(self.step)
        self.ahead = self._go_ahead(begun) if begun.under_way else None
        numbers = begun.numbers()
        loss, norm = numbers["loss"], numbers["grad_norm"]
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._nonfinite(loss, norm)
            return None
        if c.on_nonfinite == "skip":
            self.lost = 0
        self.made = self.step
        self.step += 1
        self.recent.append(loss)
        for name, spikes in self.spikes.items():
            if spikes.add(numbers[name]):
                self.on_event("note", {"what": f"step {self.step}: {name} {numbers[name]:.4g} is a spike"})
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
        return numbers

    def _begin_step(self, step: int) -> Begun:
        """Begins the update of a step, and the copies that its row needs."""
        if not (self.leads and self.config.log_every and (step + 1) % self.config.log_every == 0):
            return self.begin(step, self._rate(step))
        before = self.ratio.weights()
        begun = self.begin(step, self._rate(step))
        after = self.ratio.weights()
        return replace(begun, ratio=lambda: self.ratio.between(before(), after()))

    def _go_ahead(self, begun: Begun) -> Begun | None:
        """Begins the update behind one that is under way, unless something is to be done between the two. It waits for
        nothing and changes nothing that the one before is looked at by; where that is not finite, it does nothing."""
        c, step = self.config, begun.step + 1
        counts = (c.eval_every, c.sample_every, self.every)
        busy = any(count and step % count == 0 for count in counts) or any(self._asked(self.interrupted()))
        while step in self.left_out:
            step += 1
        if busy or step >= c.max_steps:
            return None
        try:
            return self._begin_step(step)
        except Interrupted:
            return None
        except Exception as e:
            return Begun(step, False, partial(_raise, e))

    def _drop_ahead(self) -> None:
        """Waits for the update that was begun behind one that failed, and forgets it."""
        if self.ahead is not None:
            with suppress(Error):
                self.ahead.numbers()
        self.ahead = None

    def _nonfinite(self, loss: float, norm: float) -> None:
        """Keeps the update and says where it fails; then stops, leaves it out, or goes back and leaves it out."""
        c, bad = self.config, self.step
        if not math.isfinite(norm):
            self._drop_ahead()
        self.passes.clear()
        what = f"step {bad + 1}: the loss is {loss} and the gradient norm {norm}"

        def kept() -> tuple[str, int | None, bool]:
            failure = self._failure(bad)
            finding = examine(self.passes, failure)
            numbers = {"loss": repr(loss), "grad_norm": repr(norm), "left_out": sorted(self.left_out)}
            path = keep(self.folder, self.passes, failure, finding, numbers)
            with suppress(NonFiniteError):  # a checkpoint of weights that are spoiled already
                self.checkpoints.wait()
            known = list(dict.fromkeys(n for row in failure.rows for n in row["documents"]))
            texts = ", ".join(map(str, known[:8])) + (f" and {len(known) - 8} more" if len(known) > 8 else "")
            said = f"{what}: {finding}" if finding else what
            states = {name for name, _, _ in self.model.store.types()}
            before = finding is not None and any(v.nonfinite and v.name in states for v in finding.inputs)
            said = f"{said}; the batch holds documents {texts}; kept in {path}"
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
        left_out = self.left_out | {bad}
        if not skips and newest is not None:
            self._drop_ahead()
            self._restore(newest)
            self.saved = -1
            if self.leads:
                self.metrics.cut(newest)
                if c.sample_prompts:
                    self.samples.cut(newest)
            what = f"{what}; back to step {newest}"
        self.left_out = left_out
        self.on_event("note", {"what": f"{what}; going on without update {bad + 1}"})

    def _failure(self, step: int) -> Failure:
        """All that the update of a step is made of."""
        parts = self.config.gradient_accumulation_steps
        batches = [(i, self.batches.ready(i)) for i in range(step * parts, (step + 1) * parts)]
        labels = sum(b.labels for _, b in batches), sum(b.sentence_labels for _, b in batches)
        rows = []
        for i, (draw, batch) in enumerate(batches):
            documents = [[*map(self.source.number, row)] for row in self.batches.documents(draw)]
            rows += [{"batch": i, **row} for row in rows_of(self.source.tokenizer, batch, documents)]
        return Failure(Update(step, self._rate(step), self.passes.counts(*labels)), batches, rows)

    def _rate(self, step: int) -> float:
        """The learning rate of a step."""
        c = self.config
        return learning_rate(
            step,
            kind=c.lr_scheduler_type,
            peak=c.learning_rate,
            floor=min(c.min_learning_rate, c.learning_rate),
            warmup_steps=c.warmup_steps,
            total_steps=c.max_steps,
            settings=c.lr_scheduler_kwargs,
        )

    def begin(self, step: int, lr: float) -> Begun:
        """Begins the update of a step: on the CPU, and beside other processes, it is over when this returns."""
        c, began = self.config, time.perf_counter()
        parts = c.gradient_accumulation_steps
        # Batch i is that of process i modulo their number.
        mine = range(step * parts + self.comm.rank, (step + 1) * parts, self.comm.size)
        batches = [self.batches.ready(i) for i in mine]
        loaded = time.perf_counter()
        update = Update(step, lr, self._counts(batches))
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
                "loss": sum(self._means(losses, update.counts).values()),
                "learning_rate": lr,
                "grad_norm": norm,
                "tokens_per_s": tokens / spent,
                "seconds": self.seconds,
                "loader_wait_seconds": loaded - began,
            }

        return Begun(step, last.under_way, numbers)

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

    def _counts(self, batches: Sequence[Batch]) -> dict[str, int]:
        """How many labels each loss of all processes' batches is summed over, at least 1."""
        mine = (sum(b.labels for b in batches), sum(b.sentence_labels for b in batches))
        labels, sentences = map(sum, zip(*self.comm.gather(mine), strict=True))
        return self.passes.counts(labels, sentences)

    def _means(self, losses: list[dict[str, float]], counts: dict[str, int]) -> dict[str, float]:
        """The means of summed losses, added over all processes' batches in the order of the batches."""
        rounds = zip_longest(*self.comm.gather(losses))
        every = [one for some in rounds for one in some if one is not None]
        return {name: sum(one[name] for one in every) / counts[name] for name in self.passes.losses}

    def predicted_bytes(self, rows: int) -> int:
        """The memory that a pass over a batch of so many rows takes, states included."""
        batch = self.batches.ready(0)
        labelled = math.ceil(batch.sizes.labelled * rows / batch.sizes.batch)
        sizes = replace(batch.sizes, batch=rows, labelled=labelled)
        traced = self.passes.trace(replace(batch, arrays={}, sizes=sizes))
        model = self.model
        lowered = traced.lower(model.device, bf16=model.bf16, recompute=self.config.recompute)
        return lowered.bytes + self.passes.apart(lowered)

    def _predict(self) -> None:
        """Sets what is recomputed, and says what that, and rounding what is kept, saves and costs."""
        c, device, bf16 = self.config, self.model.device, self.model.bf16
        rounded = bf16 and device == "cpu"
        if not c.recompute and not c.memory and not rounded:
            return
        traced = self.passes.trace(self.batches.ready(self.step * c.gradient_accumulation_steps))
        plain = traced.lower(device, bf16=bf16 and not rounded)
        apart = self.passes.apart(plain)
        memory = max(1, parsed_size(c.memory) - apart) if c.memory else 0
        self.passes.saving = {"recompute": c.recompute, "memory": memory}
        chosen = traced.lower(device, bf16=bf16, recompute=c.recompute, memory=memory)
        ways, cost = [], ""
        if c.recompute or c.memory:
            ways.append(f"{chosen.recomputed} of {len(plain.graph.layers())} layers recomputed")
            cost = f"; {100 * (chosen.plan.flops / max(1, plain.plan.flops) - 1.0):.1f} % more arithmetic"
        if rounded:
            ways.append("what waits for the backward pass in bfloat16")
        what = (
            f"memory: {(chosen.bytes + apart) / 1e6:,.0f} MB predicted with {' and '.join(ways)}, "
            f"{(plain.bytes + apart) / 1e6:,.0f} MB without{cost}"
        )
        self.on_event("note", {"what": what})

    def _evaluate(self) -> float:
        """Measures the loss over the whole held-out text, always the same batches; once for each step.

        Raises:
            Interrupted: a signal came.
        """
        step, loss = self.measured
        if step == self.step:
            return loss
        runs: list[AnyRun] = []
        batches = []
        self._exchange()
        try:
            for i in range(self.comm.rank, self.evaluation.batches_per_pass, self.comm.size):
                if self.interrupted():
                    raise Interrupted
                batch = self.evaluation.ready(i)
                make = partial(programs.evaluate, self.model.family, batch.sizes)
                run = self.model.program(("evaluate", batch.sizes), make)
                runs.append(run.start(**self.passes.arrays(batch)))
                batches.append(replace(batch, arrays={}))
        finally:
            self._exchange()
        losses = [{name: float(run.result()[name]) for name in self.passes.losses} for run in runs]
        counts = self._counts(batches)
        means = self._means(losses, counts)
        loss = sum(means.values())
        self.measured = self.step, loss
        numbers = {"step": self.step, "valid_loss": loss, "valid_labels": counts[self.passes.losses[0]]}
        if len(means) > 1:
            numbers |= {f"valid_{name}": mean for name, mean in means.items() if name != "loss"}
        self._log(numbers)
        self._tell_counted()
        self.callbacks.tell("evaluate", self.step, numbers)
        self.on_event("eval", numbers)
        self._judge(loss)
        if loss < self.best:
            self.best, self.best_step = loss, self.step
            if self.config.load_best_model_at_end:
                self._save()
        return loss

    def _tell_counted(self) -> None:
        """Says how many tokens the text has, once that is known."""
        if self.told or not (counted := self._counted()):
            return
        self.told = True
        known = {name.removesuffix("_tokens"): f"{count:,}" for name, count in counted.items()}
        what = f"{known['train']} tokens to learn from"
        if "valid" in known:
            what += f", {known['valid']} held out"
        self.on_event("note", {"what": f"all text is tokenized: {what}"})
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
        self._exchange()
        texts = samples(self.model, prompts, self.config.seed) if self.leads else []
        self._exchange()
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

    def _exchange(self) -> None:
        """Exchanges the weights with their running average, if there is one."""
        if self.config.ema_decay > 0:
            store = self.model.store
            for name in self._mine():
                weights, average = store.get(name), store.get(AVERAGES + name)
                store.set(name, average)
                store.set(AVERAGES + name, weights)
            if self.sharing:
                self.sharing.publish(self.model)

    def _judge(self, loss: float) -> None:
        """Counts the evaluations, one every ``eval_every`` updates, since the loss was last lower than the best by more
        than the threshold."""
        c = self.config
        if c.eval_every and self.step % c.eval_every == 0 and self.step > self.judged:
            self.judged = self.step
            better = self.best - loss > c.early_stopping_threshold
            self.patience_used = 0 if better else self.patience_used + 1
            if self._stalled():
                what = (
                    f"step {self.step}: no better held-out loss in {self.patience_used} evaluations; stopping"
                )
                self.on_event("note", {"what": what})

    def _stalled(self) -> bool:
        return 0 < self.config.early_stopping_patience <= self.patience_used


def _raise(error: Exception) -> NoReturn:
    raise error
