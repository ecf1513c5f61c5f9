"""Loss scaling in float32, where a scale that is a power of two changes no bit; gradients overflow where planted."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recipes import OBJECTIVES, write_text

import pyrformer as pf
from pyrformer.optimizers import AdamW
from pyrformer.training import loss_scale, updates
from pyrformer.training.failure import replay
from pyrformer.training.finders import find_learning_rate
from pyrformer.training.loss_scale import LossScale
from pyrformer.training.passes import Passes, Update

#: Between the norms of the gradients of these runs.
CLIP = 1.5
#: What clocks say.
CLOCKS = {
    "seconds", "tokens_per_s", "loader_wait_seconds", "save_stall_seconds", "rss_bytes", "utilisation",
}  # fmt: skip


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., pf.Run]:
    def run(out: str, name: str = "ar", on_event: Any = None, **more: Any) -> pf.Run:
        text = write_text(tmp_path, name)
        small = {
            "seq_len": 16,
            "batch_size": 2,
            "max_steps": 6,
            "warmup_steps": 2,
            "log_every": 1,
            "save_every": 3,
        }
        given = {**small, **OBJECTIVES[name], **more}
        return pf.train(pf.TrainConfig(files=[str(text)], out=str(tmp_path / out), **given), on_event)

    return run


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets runs scale their losses, from a scale on."""

    def go(first: float = loss_scale.FIRST) -> None:
        monkeypatch.setattr(updates, "first_scale", lambda _config: LossScale(first))

    return go


@pytest.fixture
def overflow(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, float]], None]:
    """Makes the gradients of some updates infinite where the scale is more than so much."""

    def go(most: dict[int, float]) -> None:
        ready = Passes.ready

        def planted(self: Passes, batch: Any, draw: int, update: Update) -> Any:
            program, inputs = ready(self, batch, draw, update)
            if update.scale > most.get(update.step, math.inf):
                inputs["loss_scale"] = np.inf
            return program, inputs

        monkeypatch.setattr(Passes, "ready", planted)

    return go


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text("utf-8").splitlines())
    return [{k: v for k, v in row.items() if k not in CLOCKS} for row in lines]


def losses(folder: Path) -> list[dict[str, Any]]:
    return [row for row in rows(folder) if "loss" in row]


def tensors(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.safetensors"))}


def state(folder: Path, step: int) -> dict[str, Any]:
    found = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text("utf-8"))
    return {k: v for k, v in found.items() if k not in CLOCKS}


def test_the_scale_halves_at_once_and_doubles_after_two_thousand() -> None:
    """As ``torch.amp.GradScaler``: its ``_growth_tracker`` is ``finite``."""
    scale = LossScale()
    for _ in range(1999):
        scale = scale.behind(finite=True)
    assert scale == LossScale(65536.0, 1999)
    assert scale.behind(finite=True) == LossScale(131072.0, 0)
    assert scale.behind(finite=False) == LossScale(32768.0, 0, 1)
    for _ in range(16):
        assert not scale.least
        scale = scale.behind(finite=False)
    assert scale == LossScale(1.0, 0, 16)
    assert scale.least
    top = LossScale(loss_scale.MOST, 1999)
    assert top.behind(finite=True) == LossScale(loss_scale.MOST, 0)
    assert 1 / np.float32(loss_scale.MOST) >= np.finfo(np.float32).tiny


@pytest.mark.parametrize(
    ("optim", "parts"),
    [
        ("adamw", 1), ("adamw", 2), ("sgd", 2), ("rmsprop", 1), ("adagrad", 2), ("lion", 1), ("adafactor", 2),
        ("muon", 1),
    ],
)  # fmt: skip
def test_a_scale_changes_no_bit(train: Any, scaled: Any, tmp_path: Path, optim: str, parts: int) -> None:
    """The norm is clipped in some updates, and is logged as it is without a scale."""
    options = {"optim": optim, "gradient_accumulation_steps": parts, "max_grad_norm": CLIP, "ema_decay": 0.5}
    train("plain", **options)
    scaled()
    train("scaled", **options)
    assert tensors(tmp_path / "scaled") == tensors(tmp_path / "plain")
    got = rows(tmp_path / "scaled")
    assert [row.pop("loss_scale") for row in got if "loss" in row] == [65536.0] * 6
    assert got == rows(tmp_path / "plain")
    norms = [row["grad_norm"] for row in got if "loss" in row]
    assert min(norms) < CLIP < max(norms)


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.0}])
def test_a_scale_changes_no_bit_of_two_losses(
    train: Any, scaled: Any, tmp_path: Path, options: dict[str, Any]
) -> None:
    train("plain", "mlm+nsp", **options)
    scaled(2.0**40)
    train("scaled", "mlm+nsp", **options)
    assert tensors(tmp_path / "scaled") == tensors(tmp_path / "plain")


@pytest.mark.parametrize("parts", [1, 2])
def test_an_overflow_halves_the_scale_and_is_no_update(
    train: Any, scaled: Any, overflow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: int
) -> None:
    """The step and its batch are over; the optimizer and the schedule are one update behind."""
    options = {"gradient_accumulation_steps": parts, "eval_every": 4, "save_every": 4}
    with monkeypatch.context() as patch:
        rate, inputs = pf.TrainConfig.rate, AdamW.inputs
        patch.setattr(pf.TrainConfig, "rate", lambda c, step: rate(c, step - (step > 3)))
        patch.setattr(AdamW, "inputs", lambda o, step: inputs(o, step - (step > 4)))
        overflow({3: 0.5})
        train("plain", on_nonfinite="skip", **options)
    scaled()
    overflow({3: 2.0**15})
    notes: list[str] = []
    run = train(
        "scaled", on_event=lambda kind, n: notes.append(n["what"]) if kind == "note" else None, **options
    )
    assert run.steps == 6
    assert notes == [
        "step 4: the gradient overflows at loss scale 65,536; going on without this update at 32,768",
        *notes[1:],
    ]
    assert (
        tensors(tmp_path / "scaled")["model.safetensors"] == tensors(tmp_path / "plain")["model.safetensors"]
    )
    found = losses(tmp_path / "scaled")
    assert [(row["step"], row["loss_scale"]) for row in found] == [
        (1, 65536.0), (2, 65536.0), (3, 65536.0), (5, 32768.0), (6, 32768.0),
    ]  # fmt: skip
    for row, want in zip(found, losses(tmp_path / "plain"), strict=True):
        row.pop("loss_scale")
        assert row == want
    # What is due behind the step is done.
    assert (tmp_path / "scaled" / "checkpoint-4").is_dir()
    assert [row["step"] for row in rows(tmp_path / "scaled") if "valid_loss" in row] == [4, 6]
    assert not list((tmp_path / "scaled").glob("failed-step-*"))


@pytest.mark.parametrize("parts", [1, 2])
def test_a_run_that_goes_on_scales_as_a_straight_one(
    train: Any, scaled: Any, overflow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: int
) -> None:
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", 3)
    scaled()
    overflow({1: 2.0**15, 6: 2.0**16})
    options = {"gradient_accumulation_steps": parts, "max_steps": 11, "save_every": 4, "save_total_limit": 0}
    train("straight", **options)
    straight = losses(tmp_path / "straight")
    assert [round(math.log2(row["loss_scale"])) for row in straight] == [
        16,
        15,
        15,
        15,
        16,
        16,
        16,
        17,
        17,
        17,
    ]
    found = state(tmp_path / "straight", 4)["loss_scale"]
    assert found == {"value": 32768.0, "finite": 2, "overflows": 1}

    class Enough(Exception):
        pass

    def stop(kind: str, numbers: dict[str, Any]) -> None:
        if kind == "step" and numbers["step"] == 7:
            raise Enough

    with pytest.raises(Enough):
        train("run", on_event=stop, **options)
    train("run", resume=True, **options)
    assert tensors(tmp_path / "run") == tensors(tmp_path / "straight")
    assert rows(tmp_path / "run") == rows(tmp_path / "straight")
    assert state(tmp_path / "run", 11) | {"config": 0} == state(tmp_path / "straight", 11) | {"config": 0}


@pytest.mark.parametrize("what", ["stop", "skip", "rollback"])
def test_below_the_least_scale_an_update_failed(
    train: Any, scaled: Any, overflow: Any, tmp_path: Path, what: str
) -> None:
    scaled(4.0)
    overflow({1: 0.5, 2: 0.5, 4: 0.5})
    options = {"on_nonfinite": what, "save_every": 4, "max_steps": 7}
    notes: list[str] = []
    note = lambda kind, n: notes.append(n["what"]) if kind == "note" else None  # noqa: E731
    if what == "stop":
        with pytest.raises(pf.Error, match=r"step 5: .* at loss scale 1, the least: loss_scale, which"):
            train("run", on_event=note, **options)
        _, facts = replay(tmp_path / "run")
        assert facts["loss_scale"] == 1.0
        assert facts["done"] == 2
    else:
        assert train("run", on_event=note, **options).steps == 7
        assert any("without update 5" in n for n in notes)
        assert state(tmp_path / "run", 7)["loss_scale"] == {"value": 1.0, "finite": 3, "overflows": 2}
    assert sum("overflows at loss scale" in n for n in notes) == 2


def test_what_fails_is_found_among_scaled_gradients(train: Any, scaled: Any, tmp_path: Path) -> None:
    """Weights of 1e25 overflow in the first layer, at any scale."""
    scaled(1.0)
    with pytest.raises(pf.Error, match=r"in h\.0.* made .* not finite"):
        train("run", learning_rate=1e25, max_grad_norm=0.0, warmup_steps=0)
    found, facts = replay(tmp_path / "run")
    assert found is not None
    assert dataclasses.asdict(found) == facts["finding"]


def test_a_search_for_a_rate_survives_an_overflow(scaled: Any, overflow: Any, tmp_path: Path) -> None:
    scaled()
    overflow(dict.fromkeys(range(30), 2.0**14))
    text = write_text(tmp_path, "ar")
    options = {"seq_len": 16, "batch_size": 2, **OBJECTIVES["ar"], "out": str(tmp_path / "run")}
    search = find_learning_rate(pf.TrainConfig(files=[str(text)], **options), low=1e-3, updates=30)
    assert min(search.losses) < 0.9 * search.losses[0]
