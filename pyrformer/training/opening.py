"""The run folder before the first update: whether a run may have it, where it goes on from, and how it appears."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyrformer import _core
from pyrformer.checkpoint import read_json, save_config, write_json
from pyrformer.errors import ConfigError, FileError
from pyrformer.model import Model
from pyrformer.training.checkpoints import Checkpoints, read_state
from pyrformer.training.config import TrainConfig
from pyrformer.training.folder import METRICS, OPTIONS
from pyrformer.training.tokens import Place


def first_step(config: TrainConfig, checkpoints: Checkpoints, note: Callable[[str], None]) -> int:
    """The step of the checkpoint that a run goes on from; 0: it is a new one. Nothing is written.

    Raises:
        ConfigError: the run that is there had other options.
        FileError: the folder is taken, or has nothing to go on from.
    """
    c, folder = config, checkpoints.folder
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
    step, skipped = checkpoints.newest()
    for what in skipped:
        note(f"{what}; skipped")
    if step is None:
        note(f"{folder} has no checkpoint yet; starting from step 0")
        state = {"config": read_json(folder / OPTIONS)}
    else:
        state = read_state(checkpoints.path(step))
        note(f"going on from {checkpoints.path(step)}")
    # An option that there was not is at its default.
    defaults = TrainConfig(files=c.files, out=c.out).comparable()
    before, now = {**defaults, **state["config"]}, json.loads(json.dumps(c.comparable()))
    changed = sorted(k for k in now if before[k] != now[k])
    if changed:
        raise ConfigError(
            f"[train] {folder} was trained with another {', '.join(changed)}; use the same to resume"
        )
    return step or 0


def open_folder(
    checkpoints: Checkpoints, start: int, model: Model, facts: dict[str, Any], place: Place
) -> None:
    """Makes the folder ready for a run.

    Args:
        start: the step that it goes on from.
        facts: what ``training.json`` holds.
        place: the tokens, which go into a new folder.
    """
    folder = checkpoints.folder
    try:
        if start:
            checkpoints.clean()
            write_json(folder / OPTIONS, facts)
        else:
            _create(folder, model, facts, place)
    except OSError as e:
        if isinstance(e, FileError):
            raise
        raise FileError(f"[train] {folder}: {e.strerror or e}") from None


def _create(folder: Path, model: Model, facts: dict[str, Any], place: Place) -> None:
    """Makes the folder of a new run appear at once, with all but weights and numbers."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.is_dir() and any(folder.iterdir()):  # to be overwritten, or killed before any checkpoint
        aside = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
        folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
    directory = _core.AtomicDir(folder)
    path = Path(directory.path or "")
    try:
        save_config(model, path)
        write_json(path / OPTIONS, facts)
        (path / METRICS).touch()
        with place.moving(path, folder):
            directory.commit(replace=True)
    finally:
        directory.discard()
