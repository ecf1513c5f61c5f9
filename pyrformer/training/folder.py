"""The names of what a run folder holds beside the model and its checkpoints."""

from __future__ import annotations

import re
from pathlib import Path

#: All options; the file that marks a run folder.
OPTIONS = "training.json"
#: A row for each log step and each evaluation.
METRICS = "metrics.jsonl"
#: Continuations of prompts by the model of a step.
SAMPLES = "samples.jsonl"
#: The text of the run, prepared: see :mod:`pyrformer.data.prepared`.
TOKENS = "tokens"
_FAILED = re.compile(r"failed-step-(\d{1,18})")


def failed(folder: Path, step: int) -> Path:
    """Where an update that was not finite is kept, counted from 1."""
    return folder / f"failed-step-{step}"


def failures(folder: Path) -> list[int]:
    """The updates that are kept because they were not finite, ascending."""
    found = (_FAILED.fullmatch(p.name) for p in folder.iterdir()) if folder.is_dir() else ()
    return sorted(int(m[1]) for m in found if m)
