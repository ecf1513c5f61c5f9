"""Updates whose loss or gradient is no finite number: kept, and looked at again, operation by operation.

The core ends such an update before it changes weights or moments, so both are what they were. ``RUN/failed-step-7``
holds all that the update is made of: ``model.safetensors`` (the parameters), ``config.json`` and the tokenizer,
``batch.safetensors`` (the arrays of batch i as ``i.input_ids`` …) and ``failure.json`` (options, learning rate, sizes,
rows and their documents, and what was found). An update of a device is looked at again on the CPU.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pyrformer import _core
from pyrformer.batch import Batch
from pyrformer.checkpoint import CONFIG, WEIGHTS, read_json, write_json
from pyrformer.compile import Compiled
from pyrformer.errors import Error, FileError
from pyrformer.model import Model
from pyrformer.models import build
from pyrformer.programs import Sizes
from pyrformer.tokenizers import Tokenizer
from pyrformer.training.checkpoints import load_parameters
from pyrformer.training.config import TrainConfig
from pyrformer.training.folder import OPTIONS, failed, failures
from pyrformer.training.initial import apply_changes
from pyrformer.training.passes import Passes, Update

BATCH, FACTS = "batch.safetensors", "failure.json"
#: Characters of a row's text that are kept.
EXCERPT = 160


@dataclass(frozen=True)
class Values:
    """What a tensor holds.

    Attributes:
        name: of a parameter or an input, or the "step 12" that made it; "" for a result.
        type: as in "float32[2, 16]".
        low, high: the least and the greatest finite value; None where none is finite.
        nonfinite: how many values are not finite.
    """

    name: str
    type: str
    low: float | None
    high: float | None
    nonfinite: int

    @property
    def range(self) -> str:
        """The range in words: "-0.1 … 3.4e+38, 2 not finite"."""
        finite = "no finite value" if self.low is None else f"{self.low:.4g} … {self.high:.4g}"
        return finite + (f", {self.nonfinite:,} not finite" if self.nonfinite else "")


@dataclass(frozen=True)
class Finding:
    """The first operation of an update whose result is not finite.

    Attributes:
        program: "train_step", "accumulate_step", "gradients" or "apply_step".
        batch: the batch of the update, from 0; None in "apply_step".
        step: its number in the program's plan.
        operation: as ``pyrformer plan`` prints it.
        layer: the part of the model, "transformer.h.0.attn"; "" outside of all.
        inputs: what it reads. Where one of these is not finite, it was so before the update.
        outputs: what it makes; empty where an input was not finite.
    """

    program: str
    batch: int | None
    step: int
    operation: str
    layer: str
    inputs: list[Values]
    outputs: list[Values]

    def __str__(self) -> str:
        spoiled = [v.name for v in self.inputs if v.nonfinite]
        where = f" in {self.layer}" if self.layer else ""
        if spoiled:
            return f"{spoiled[0]}, which {self.operation}{where} reads, was not finite before"
        most = max(self.inputs, key=lambda v: max(abs(v.low or 0.0), abs(v.high or 0.0)), default=None)
        of = f" from {most.name} ({most.range})" if most else ""
        bad = next(v for v in self.outputs if v.nonfinite)
        return f"{self.operation}{where} made {bad.nonfinite:,} of {bad.type} not finite{of}"


@dataclass(frozen=True)
class Failure:
    """An update to be made again.

    Attributes:
        batches: the update's batches and their numbers in the run.
        rows: for each row its batch, its number, its documents and the beginning of its text.
    """

    update: Update
    batches: list[tuple[int, Batch]]
    rows: list[dict[str, Any]]


def examine(passes: Passes, failure: Failure) -> Finding | None:
    """Makes an update again, up to the first value that is not finite; None: all are finite. Weights and moments stay
    as they are where one is found; those of a device always do, for it is a copy that is looked at."""
    passes = _on_cpu(passes)
    passes.clear()
    try:
        for i, (draw, batch) in enumerate(failure.batches):
            found = _find(*passes.ready(batch, draw, failure.update), batch=i)
            if found:
                return found
        if passes.several and not passes.shared:
            return _find(*passes.end(failure.update), batch=None)
        return None
    finally:
        passes.clear()


def _on_cpu(passes: Passes) -> Passes:
    """Passes that do the same on the CPU, where the values between operations are seen: themselves, or, of a device's,
    on copies of all states."""
    model = passes.model
    if isinstance(model.store, _core.Store):
        return passes
    copy = Model(model.family, model.tokenizer, threads=model.threads)
    for name, _, _ in model.store.types():
        copy.store.set(name, model.store.get(name))
    there = Passes(copy, passes.config, owned=passes.owned, scaled=passes.scaled)
    there.saving = passes.saving
    return there


def _find(program: Compiled, inputs: dict[str, Any], *, batch: int | None) -> Finding | None:
    found = program.find_nonfinite(**inputs)
    if found is None:
        return None
    number, read, made = found
    _, operation, *_, layer = program.plan.table()[number]
    return Finding(
        program.name, batch, number, operation, layer, [*map(_values, read)], [*map(_values, made)]
    )


def _values(given: tuple[tuple[str, str, list[int]], float, float, int]) -> Values:
    (name, dtype, shape), low, high, nonfinite = given
    there = low <= high
    return Values(name, f"{dtype}{shape}", low if there else None, high if there else None, nonfinite)


def rows_of(tokenizer: Tokenizer, batch: Batch, documents: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """For each row of a batch that has some its documents, and the beginning of its text."""
    ids = batch.arrays["input_ids"]
    out = []
    for i, found in enumerate(documents):
        row = ids[i]
        if "segments" in batch.arrays:
            row = row[batch.arrays["segments"][i] > 0]
        text = tokenizer.decode(row.astype(np.uint32).tolist(), skip_special_tokens=True)
        if found:
            out.append({"row": i, "documents": list(found), "text": text[:EXCERPT]})
    return out


def look(
    what: str, folder: Path, passes: Passes, failure: Failure, numbers: dict[str, Any]
) -> tuple[str, bool]:
    """Finds where an update fails, and keeps it.

    Args:
        what: is wrong with it.
        numbers: loss and gradient norm, as text.

    Returns:
        ``what`` with all that was found, and where it is kept; whether weights or states were not finite before.
    """
    finding = examine(passes, failure)
    path = keep(folder, passes, failure, finding, numbers)
    known = list(dict.fromkeys(n for row in failure.rows for n in row["documents"]))
    texts = ", ".join(map(str, known[:8])) + (f" and {len(known) - 8} more" if len(known) > 8 else "")
    states = {name for name, _, _ in passes.model.store.types()}
    before = finding is not None and any(v.nonfinite and v.name in states for v in finding.inputs)
    said = f"{what}: {finding}" if finding else what
    return f"{said}; the batch holds documents {texts}; kept in {path}", before


def keep(
    folder: Path, passes: Passes, failure: Failure, finding: Finding | None, numbers: dict[str, Any]
) -> Path:
    """Writes ``failed-step-N``, whole or not at all, and removes older ones; where it is.

    Args:
        numbers: loss and gradient norm, as text.
    """
    step, model = failure.update.step + 1, passes.model
    path = failed(folder, step)
    directory = _core.AtomicDir(path)
    inside = Path(directory.path or "")
    try:
        _core.write_safetensors(inside / WEIGHTS, model.state_dict())
        write_json(inside / CONFIG, model.config)
        if model.tokenizer is not None:
            model.tokenizer.save(inside)
        arrays = {
            f"{i}.{name}": np.ascontiguousarray(array)
            for i, (_, batch) in enumerate(failure.batches)
            for name, array in batch.arrays.items()
        }
        _core.write_safetensors(inside / BATCH, arrays)
        facts = {
            "step": step,
            **numbers,
            "finding": None if finding is None else dataclasses.asdict(finding),
            "done": failure.update.done,
            "learning_rate": failure.update.lr,
            **({"loss_scale": failure.update.scale} if passes.scaled else {}),
            "counts": failure.update.counts,
            "draws": [draw for draw, _ in failure.batches],
            "sizes": [dataclasses.asdict(batch.sizes) for _, batch in failure.batches],
            "rows": failure.rows,
            "config": dataclasses.asdict(passes.config),
        }
        write_json(inside / FACTS, facts)
        directory.commit(replace=True)
    finally:
        directory.discard()
    for other in failures(folder):
        if other != step:
            shutil.rmtree(failed(folder, other), ignore_errors=True)
    return path


def replay(folder: str | Path, threads: int = 0) -> tuple[Finding | None, dict[str, Any]]:
    """Makes an update that failed once more, and looks at the values of each operation.

    Args:
        folder: a run folder, or its ``failed-step-N``.
        threads: 0: as many as the run had; their number changes no value.

    Returns:
        The first operation that makes a value that is not finite, None where all are finite; and ``failure.json``.

    Raises:
        FileError: there is no such update, or its files cannot be read.
    """
    path = Path(folder)
    if (path / OPTIONS).is_file():
        kept = failures(path)
        if not kept:
            raise FileError(f"[replay] no update of {path} failed: it has no failed-step folder")
        path = failed(path, kept[-1])
    if not (path / FACTS).is_file():
        raise FileError(f"[replay] {path} has no {FACTS}; give a run or its failed-step folder")
    facts = read_json(path / FACTS)
    try:
        return _made_again(path, facts, threads), facts
    except Error:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as e:
        raise FileError(f"[replay] {path / FACTS} is not what a run writes: {e!r}") from None


def _made_again(path: Path, facts: dict[str, Any], threads: int) -> Finding | None:
    """Makes the update that ``facts`` describe once more."""
    given = facts["config"]
    # In float32, but for what the CPU itself had rounded.
    rounded = given.get("bf16", False) and given.get("device", "cpu") == "cpu"
    on_cpu = {"resume": False, "overwrite": False, "device": "cpu", "bf16": rounded, "fp16": False}
    config = TrainConfig(**{**given, **on_cpu})
    model = Model(
        build(read_json(path / CONFIG)),
        threads=threads or config.threads or None,
        precision=config.precision,
    )
    apply_changes(model, config)
    load_parameters(path, model)
    stored = _core.SafeTensors(path / BATCH)
    batches = []
    for i, (draw, sizes) in enumerate(zip(facts["draws"], facts["sizes"], strict=True)):
        names = [name for name, _, _ in stored.tensors() if name.startswith(f"{i}.")]
        arrays = {name.partition(".")[2]: stored.get_int32(name) for name in names}
        size = Sizes(**sizes)
        b, t = arrays["input_ids"].shape
        labelled = arrays["labels"].size if size.labelled else 0
        if (size.batch, size.tokens, size.labelled, size.remembered) != (
            b,
            t,
            labelled,
            0,
        ) or size.targets > t:
            raise ValueError(f"sizes of batch {i} that are not those of its arrays")
        batches.append((int(draw), Batch(size, arrays)))
    counts = {name: int(count) for name, count in facts["counts"].items()}
    step, scaled = int(facts["step"]) - 1, "loss_scale" in facts
    done, scale = int(facts.get("done", step)), float(facts.get("loss_scale", 1.0))
    update = Update(step, done, float(facts["learning_rate"]), counts, scale)
    return examine(Passes(model, config, scaled=scaled), Failure(update, batches, []))
