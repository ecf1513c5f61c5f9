"""Checkpoints: written beside the training, whole or not at all, verified before anyone goes on from them.

``RUN/checkpoint-500`` holds ``model.safetensors`` (all parameters), ``optimizer.safetensors``, ``config.json``,
``tokenizer.json``, ``tokenizer_config.json``, ``trainer_state.json`` and ``manifest.json``: size and SHA-256 of each
other file. It is built under a hidden name, flushed to disk, and renamed; a process that is killed leaves the
checkpoints before it as they were.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyrformer import _core
from pyrformer.checkpoint import (
    CONFIG,
    WEIGHTS,
    copy_into,
    digest,
    read_json,
    save,
    stored_tensors,
    write_json,
)
from pyrformer.compile import Array
from pyrformer.errors import Error, FileError, NonFiniteError
from pyrformer.fields import parse_json
from pyrformer.model import Model
from pyrformer.optimizers import AVERAGES

OPTIMIZER, STATE, MANIFEST = "optimizer.safetensors", "trainer_state.json", "manifest.json"
_NAME = re.compile(r"checkpoint-(\d{1,18})")


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds, copied, so that training goes on meanwhile.

    Attributes:
        step: updates made.
        parameters: all parameters by name.
        moments: the optimizer's states and running averages by name; the run folder's model holds the averages.
        state: further values for ``trainer_state.json``.
    """

    step: int
    parameters: dict[str, Array]
    moments: dict[str, Array]
    state: dict[str, Any]


def check_finite(snapshot: Snapshot) -> None:
    """Refuses values that nobody could go on from: an update can spoil weights or moments while its own loss and
    gradient are finite.

    Raises:
        NonFiniteError: one is not finite.
    """
    for name, array in (snapshot.parameters | snapshot.moments).items():
        # Extremes are NaN where any value is; this makes no copy.
        if array.size and not (math.isfinite(array.min()) and math.isfinite(array.max())):
            raise NonFiniteError(
                f"[train] after update {snapshot.step} {name} has values that are not finite; it is not saved, the "
                "checkpoints before it are whole; lower learning_rate"
            )


def problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None where each file is as it was written."""
    try:
        files = read_json(folder / MANIFEST).get("files")
        if not isinstance(files, dict) or not {WEIGHTS, OPTIMIZER, CONFIG, STATE} <= files.keys():
            return f"{MANIFEST} does not list its files"
        for name, wanted in files.items():
            path = folder / name
            if path.name != name or not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != wanted["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, not {wanted['bytes']}"
            if digest(path) != wanted["sha256"]:
                return f"{name} is not what was written"
    except (OSError, KeyError, TypeError) as e:
        return str(e) if isinstance(e, FileError) else f"{MANIFEST} or a file cannot be read ({e!r})"
    return None


class Checkpoints:
    """The checkpoints of one run folder. At most one is being written at a time."""

    def __init__(self, folder: Path, keep: int):
        """
        Args:
            folder: the run folder.
            keep: how many of the newest to keep; 0: all.
        """
        self.folder, self.keep = folder, keep
        #: Steps whose checkpoints were finished and not yet told of.
        self.written: deque[int] = deque()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def steps(self) -> list[int]:
        """The steps of those that are there, ascending."""
        found = (_NAME.fullmatch(p.name) for p in self.folder.iterdir()) if self.folder.is_dir() else ()
        return sorted(int(m[1]) for m in found if m)

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is."""
        return self.folder / f"checkpoint-{step}"

    def newest(self) -> tuple[int | None, list[str]]:
        """The step of the newest one that is whole, and a sentence on each newer one that is not.

        Raises:
            FileError: there are checkpoints, but none is whole.
        """
        skipped: list[str] = []
        for step in reversed(self.steps()):
            wrong = problem(self.path(step))
            if wrong is None:
                return step, skipped
            skipped.append(f"{self.path(step)} is damaged: {wrong}")
        if skipped:
            raise FileError(
                f"[train] no checkpoint of {self.folder} is whole ({'; '.join(skipped)}); --overwrite starts again"
            )
        return None, skipped

    def clean(self) -> None:
        """Removes what a killed process left half-written."""
        for path in self.folder.glob(".*.partial"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def load(self, step: int, model: Model, wanted: Callable[[str], bool] = lambda _: True) -> None:
        """Sets a model's parameters, and the states of its optimizer whose names are wanted.

        Raises:
            FileError, StateError: a file cannot be read or does not fit the model.
        """
        load_parameters(self.path(step), model)
        moments = _core.SafeTensors(self.path(step) / OPTIMIZER)
        copy_into(model, moments, {name: name for name, _, _ in moments.tensors() if wanted(name)})

    def save(self, snapshot: Snapshot, model: Model, best: int, then: Callable[[], None]) -> None:
        """Begins to write a checkpoint, and the run folder's own model after it; waits for the one before.

        Args:
            model: gives the family and the tokenizer; its weights may change meanwhile.
            best: the step whose checkpoint is never removed; 0: none.
            then: called before the checkpoint takes its name, to flush what must not be younger than it.

        Raises:
            FileError: the one before could not be written.
            NonFiniteError: the one before held a value that is not finite, and was not written.
        """
        self.wait()

        def work() -> None:
            try:
                check_finite(snapshot)
                then()
                # The run folder's model first: it is never older than the newest checkpoint.
                averages = {
                    name.removeprefix(AVERAGES): value
                    for name, value in snapshot.moments.items()
                    if name.startswith(AVERAGES)
                }
                save(model, self.folder, stored_tensors(model, snapshot.parameters | averages))
                self._write(snapshot, model)
                self._prune(best)
                self.written.append(snapshot.step)
            except BaseException as e:
                self._error = e

        self._thread = threading.Thread(target=work, name="pyrformer-checkpoint", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Waits until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def wait(self) -> None:
        """Waits until the last one is on disk.

        Raises:
            FileError: it could not be written; those before it are as they were.
            NonFiniteError: it would have held a value that is not finite.
        """
        self.join()
        self.raise_failure()

    def raise_failure(self) -> None:
        """Raises what went wrong while writing, if anything did."""
        if self._error is None:
            return
        error, self._error = self._error, None
        if isinstance(error, Error) or not isinstance(error, OSError):
            raise error
        raise FileError(f"[train] {self.folder}: {error.strerror or error}") from None

    def _write(self, snapshot: Snapshot, model: Model) -> None:
        directory = _core.AtomicDir(self.path(snapshot.step))
        path = Path(directory.path or "")
        try:
            _core.write_safetensors(path / WEIGHTS, snapshot.parameters)
            _core.write_safetensors(path / OPTIMIZER, snapshot.moments)
            write_json(path / CONFIG, model.config)
            if model.tokenizer is not None:
                model.tokenizer.save(path)
            write_json(path / STATE, {"step": snapshot.step, **snapshot.state})
            files = {p.name: {"bytes": p.stat().st_size, "sha256": digest(p)} for p in sorted(path.iterdir())}
            write_json(path / MANIFEST, {"files": files})
            directory.commit(replace=True)
        finally:
            directory.discard()

    def _prune(self, best: int) -> None:
        """Removes all but the newest and the best; each loses its name first, so that none is ever seen in part."""
        if self.keep == 0:
            return
        for step in self.steps()[: -self.keep]:
            if step != best:
                aside = self.folder / f".checkpoint-{step}.{os.getpid()}.partial"
                os.rename(self.path(step), aside)
                shutil.rmtree(aside, ignore_errors=True)


def load_parameters(folder: Path, model: Model) -> None:
    """Sets a model's parameters from ``model.safetensors`` of a checkpoint, which holds them as they are in training.

    Raises:
        FileError, StateError: the file cannot be read or does not fit the model.
    """
    weights = _core.SafeTensors(folder / WEIGHTS)
    stored = {name: tuple(shape) for name, _, shape in weights.tensors()}
    wanted = {name: p.shape for name, p in model.family.named_parameters()}
    if stored != wanted:
        differ = next(n for n in {**wanted, **stored} if stored.get(n) != wanted.get(n))
        raise FileError(
            f"[train] {folder / WEIGHTS} does not fit the configuration at {differ!r}; take another checkpoint"
        )
    copy_into(model, weights, {name: name for name in stored})


def read_state(folder: Path) -> dict[str, Any]:
    """``trainer_state.json`` of a checkpoint, after a look at its fields.

    Raises:
        FileError: it cannot be read or a field is missing.
    """
    state = read_json(folder / STATE)
    for name, kind in (("step", int), ("seconds", (int, float)), ("config", dict), ("data", dict)):
        if not isinstance(state.get(name), kind):
            raise FileError(f"[train] {folder / STATE} has no {name!r}; resume from another checkpoint")
    return state


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl``; a last line that was cut off is left out."""
    rows = []
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            row = parse_json(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows
