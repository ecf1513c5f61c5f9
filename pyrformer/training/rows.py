"""Files of a run that grow by a line at a time, ``metrics.jsonl`` and ``samples.jsonl``, and who else is told."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from pyrformer import _core
from pyrformer.training.checkpoints import read_rows
from pyrformer.training.lock import hold


class Callback(Protocol):
    """What takes the numbers of a run as they come; a ``wandb`` run does.

    Called in the thread that trains, by the first of several processes. What it raises ends the run, resumable from the
    last checkpoint. These are called, too, where a callback has them:

    * ``on_evaluate(step, numbers)``: after an evaluation; its numbers are also logged.
    * ``on_sample(step, samples)``: after sampling; dicts with "prompt" and "text".
    * ``on_save(step, folder)``: when a checkpoint is on disk.
    * ``on_end(numbers)``: when the run is finished; its figures as in the event "end".
    """

    def log(self, data: dict[str, Any], step: int) -> Any:
        """Takes a row of ``metrics.jsonl``. After going on from a checkpoint, steps may come once more."""


class Callbacks:
    """All callbacks of a run as one."""

    def __init__(self, callbacks: Sequence[Callback]):
        self._callbacks = list(callbacks)

    def log(self, row: dict[str, Any]) -> None:
        """Tells all of a row."""
        for callback in self._callbacks:
            callback.log(row, step=row["step"])

    def tell(self, what: str, *arguments: Any) -> None:
        """Calls ``on_<what>`` of those that have it."""
        for callback in self._callbacks:
            method = getattr(callback, f"on_{what}", None)
            if method is not None:
                method(*arguments)


class Rows:
    """A file of JSON lines, each with its "step", open for appending; what was written after ``step``, by a process
    that is gone, is cut off.

    Attributes:
        steps: those that have a row.
    """

    def __init__(self, path: Path, step: int):
        self.path = path
        self.cut(step)

    def cut(self, step: int) -> None:
        """Removes the rows after a step."""
        rows = [row for row in read_rows(self.path) if row["step"] <= step]
        self.seen(rows)
        _core.write_file(self.path, "".join(json.dumps(row) + "\n" for row in rows).encode())
        if hasattr(self, "file"):
            self.file.close()
        self.file: BinaryIO = self.path.open("ab", buffering=0)

    def seen(self, rows: Sequence[dict[str, Any]]) -> None:
        """Takes note of the rows that are there."""
        self.steps = {row["step"] for row in rows}

    def write(self, row: dict[str, Any]) -> None:
        """Appends a row."""
        self.steps.add(row["step"])
        self.file.write((json.dumps(row) + "\n").encode())

    def sync(self) -> None:
        """Flushes all rows to disk."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        """Ends."""
        self.file.close()


class Metrics(Rows):
    """``metrics.jsonl``, in which a step is evaluated once: a resumed run may measure it again. Held open by the
    process that trains; see :mod:`pyrformer.training.lock`."""

    def seen(self, rows: Sequence[dict[str, Any]]) -> None:
        super().seen(rows)
        self._measured = {row["step"] for row in rows if "valid_loss" in row}

    def known(self, row: dict[str, Any]) -> bool:
        """Whether an evaluation of the step is there."""
        return "valid_loss" in row and row["step"] in self._measured

    def cut(self, step: int) -> None:
        super().cut(step)
        hold(self.file)

    def write(self, row: dict[str, Any]) -> None:
        if "valid_loss" in row:
            self._measured.add(row["step"])
        super().write(row)
