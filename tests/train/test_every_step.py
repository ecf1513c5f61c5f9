"""A run that is cut off after any update and goes on ends in the bits of one that is not: weights, averages, the
optimizer's states, metrics, samples and the final file; for every objective and every optimizer, with several batches
in an update, evaluations, a running average and dropout, and on changing numbers of threads.

``PYRFORMER_TORTURE`` (``make torture``) tries every objective with every optimizer.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from recipes import OBJECTIVES, write_text

import pyrformer as pf

STEPS = 6
OPTIMIZERS = ["adamw", "sgd", "rmsprop", "adagrad", "lion", "adafactor", "muon"]
MUCH = int(os.environ.get("PYRFORMER_TORTURE", "1")) > 1
#: Each objective and each optimizer at least once.
PAIRS = [
    (objective, optim)
    for i, objective in enumerate(OBJECTIVES)
    for j, optim in enumerate(OPTIMIZERS)
    if MUCH or (i - j) % len(OPTIMIZERS) == 0
]
#: What a clock says, or depends on the machine.
CLOCK = {"seconds", "tokens_per_s", "loader_wait_seconds", "save_stall_seconds", "rss_bytes", "utilisation"}
#: What differs between runs on purpose.
GIVEN = {"config"}


def config(text: Path, out: Path, objective: str, optim: str, **more: Any) -> pf.TrainConfig:
    options: dict[str, Any] = {
        "seq_len": 16,
        "batch_size": 3,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "warmup_steps": 2,
        "log_every": 1,
        "eval_every": 2,
        "save_every": 1,
        "save_total_limit": 0,
        "ema_decay": 0.5,
        "optim": optim,
        "learning_rate": 5e-3,
        "seed": 3,
        "threads": 1,
        **OBJECTIVES[objective],
        **more,
    }
    if objective in ("ar", "prefix"):
        options |= {"sample_every": 2, "sample_prompts": ["the "]}
    return pf.TrainConfig(files=[str(text)], out=str(out), **options)


def everything(run: Path) -> dict[str, Any]:
    """All that must be the same."""
    rows: dict[str, Any] = {}
    for name in ("metrics.jsonl", "samples.jsonl"):
        if (run / name).exists():
            lines = [json.loads(line) for line in (run / name).read_text("utf-8").splitlines()]
            rows[name] = [{k: v for k, v in row.items() if k not in CLOCK} for row in lines]
    last = run / f"checkpoint-{STEPS}"
    files = [p for folder in (run, last) for p in sorted(folder.glob("*.safetensors"))]
    files += [run / "config.json", run / "tokenizer.json"]
    state = json.loads((last / "trainer_state.json").read_text("utf-8"))
    rows["state"] = {k: v for k, v in state.items() if k not in CLOCK | GIVEN}
    return {**rows, **{str(p.relative_to(run)): p.read_bytes() for p in files}}


def cut_off(run: Path, step: int) -> None:
    """Leaves of a finished run what one has that was killed behind update ``step``, a row of metrics half written."""
    for folder in run.glob("checkpoint-*"):
        if int(folder.name.partition("-")[2]) > step:
            shutil.rmtree(folder)
    (run / "model.safetensors").unlink()
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    there = sum(json.loads(line)["step"] <= step for line in lines)
    (run / "metrics.jsonl").write_bytes(b"".join(lines[:there]) + lines[there][:-5])


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def straight(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A run of all updates that keeps every checkpoint; it equals one that saves at its end only."""
    objective, optim = request.param
    folder = tmp_path_factory.mktemp("straight")
    text = write_text(folder, objective)
    pf.train(config(text, folder / "run", objective, optim))
    pf.train(config(text, folder / "once", objective, optim, save_every=0))
    want = everything(folder / "run")
    assert want == everything(folder / "once")
    yield text, folder / "run", want, objective, optim
    shutil.rmtree(folder)


def test_going_on_behind_any_update(straight: Any, tmp_path: Path) -> None:
    text, run, want, objective, optim = straight
    assert len(want["metrics.jsonl"]) == STEPS + STEPS // 2
    assert any("optimizer" in name for name in want)
    for step in range(STEPS):
        out = tmp_path / "run"
        shutil.copytree(run, out)
        cut_off(out, step)
        notes: list[str] = []
        again = config(text, out, objective, optim, resume=True, threads=1 + step % 3)
        made = pf.train(again, lambda k, n, notes=notes: notes.append(n["what"]) if k == "note" else None)
        assert made.steps == STEPS
        begun = f"going on from {out / f'checkpoint-{step}'}" if step else "no checkpoint yet"
        assert any(begun in note for note in notes)
        got = everything(out)
        assert got.keys() == want.keys()
        assert [name for name in want if got[name] != want[name]] == [], f"behind update {step}"
        shutil.rmtree(out)
