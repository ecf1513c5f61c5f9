"""Run folders as they are read by people: what each trained, how far it came, how well it does.

Only reads: a run that goes on while it is looked at is not disturbed, and a row that is being written is left out.
"""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pyrformer.checkpoint import CONFIG, read_json
from pyrformer.errors import Error, FileError
from pyrformer.models import build
from pyrformer.models.base import Family
from pyrformer.training.checkpoints import read_rows
from pyrformer.training.folder import METRICS, OPTIONS, SAMPLES, failures
from pyrformer.training.lock import held

#: What the options' file holds that is no option.
FACTS = ("data", "environment")


@dataclass(frozen=True)
class Summary:
    """One line of ``pyrformer runs``; None: not known.

    Attributes:
        name: the path below the folder that was searched.
        family: the model's ``model_type``.
        parameters: number of values in the weights, tied ones once.
        step: the last update that is on record.
        steps: updates asked for.
        state: "running": a process trains there; "finished": all updates are made; "failed": a number was not finite
            at the update after the last one on record or later; "stopped": anything else, and ``--resume`` goes on.
        loss: of the last logged update, nats per label.
        best: the lowest held-out loss, nats per label.
        tokens: positions that updates have read, padding included.
        seconds: time spent in updates.
    """

    name: str
    family: str | None
    parameters: int | None
    step: int
    steps: int | None
    state: str
    loss: float | None
    best: float | None
    tokens: int | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


@dataclass(frozen=True)
class Record:
    """What a run folder says about itself.

    Attributes:
        folder: where it is.
        options: ``training.json`` but for :data:`FACTS`.
        data: counts and hashes of the text.
        environment: versions and machine of the process that trained last; empty for older runs.
        model: ``config.json``; empty where there is none.
        rows: ``metrics.jsonl``.
        samples: ``samples.jsonl``; empty where nothing was sampled.
    """

    folder: Path
    options: dict[str, Any]
    data: dict[str, Any]
    environment: dict[str, Any]
    model: dict[str, Any]
    rows: list[dict[str, Any]]
    samples: list[dict[str, Any]]

    @staticmethod
    def read(folder: Path) -> Record:
        """Reads a run folder.

        Raises:
            FileError: it is none, or a file in it cannot be read.
        """
        if not (folder / OPTIONS).is_file():
            raise FileError(f"[report] {folder} has no {OPTIONS}; give the folder of a run")
        options = read_json(folder / OPTIONS)
        data, environment = (_table(options.pop(name, None)) for name in FACTS)
        model = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
        try:
            rows, samples = read_rows(folder / METRICS), read_rows(folder / SAMPLES)
        except OSError as e:
            raise FileError(f"[report] cannot read {e.filename or folder}: {e.strerror}") from None
        return Record(folder, options, data, environment, model, rows, samples)

    def values(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of one figure, in the order of the rows; values that are no finite number are left out."""
        return [(row["step"], float(row[name])) for row in self.rows if _number(row.get(name))]

    def summary(self, name: str) -> Summary:
        """The run in one line, under a name."""
        family = self._family()
        loss, evaluations, seconds = (self.values(key) for key in ("loss", "valid_loss", "seconds"))
        step = max((row["step"] for row in self.rows), default=0)
        return Summary(
            name=name,
            family=kind if isinstance(kind := self.model.get("model_type"), str) else None,
            parameters=None if family is None else _count(family),
            step=step,
            steps=self._whole("max_steps"),
            state=self._state(step),
            loss=loss[-1][1] if loss else None,
            best=min(value for _, value in evaluations) if evaluations else None,
            tokens=self._tokens(step, family),
            seconds=seconds[-1][1] if seconds else 0.0,
        )

    def _family(self) -> Family | None:
        try:
            return build(self.model)
        except Error:
            return None

    def _whole(self, name: str) -> int | None:
        value = self.options.get(name)
        return value if isinstance(value, int) else None

    def _tokens(self, step: int, family: Family | None) -> int | None:
        width = self._whole("seq_len") or (None if family is None else family.max_positions)
        rows, parts = self._whole("batch_size"), self._whole("gradient_accumulation_steps")
        if width is None or rows is None or parts is None:
            return None
        return step * width * rows * parts

    def _state(self, step: int) -> str:
        if held(self.folder / METRICS):
            return "running"
        if step >= (self._whole("max_steps") or math.inf):
            return "finished"
        return "failed" if max(failures(self.folder), default=0) > step else "stopped"


def find(folder: Path) -> list[Path]:
    """All run folders in a folder, itself included, by name; neither hidden ones nor those inside of runs.

    Raises:
        FileError: it is no folder, or cannot be read.
    """
    if not folder.is_dir():
        raise FileError(f"[runs] there is no folder {folder}; say where runs are: pyrformer runs DIR")
    found = []
    for where, below, names in os.walk(folder):
        if OPTIONS in names:
            found.append(Path(where))
            below.clear()
        below[:] = sorted(name for name in below if not name.startswith("."))
    return sorted(found)


def _count(family: Family) -> int:
    return sum(math.prod(p.shape) for _, p in family.named_parameters())


def _table(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
