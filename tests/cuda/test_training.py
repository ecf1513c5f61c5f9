"""`pf.train` on the pretended device: as on the CPU, in bfloat16, and when the device is lost in mid-run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sim.card import Card

import pyrformer as pf
from pyrformer.errors import DeviceError, NonFiniteError
from pyrformer.executors import cuda
from pyrformer.training.failure import replay
from pyrformer.training.passes import Passes, Update

LOST = "[cuda] the device failed: cudaErrorIllegalAddress; the last checkpoint is intact, start again from it"


class Mortal(Card):
    """A card that fails at one of its replays, and from then on."""

    def __init__(self, replays: int) -> None:
        super().__init__(None, 1 << 19)
        self.left = replays

    def replay(self, stream: Any, graph: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise DeviceError(LOST)
        super().replay(stream, graph)

    def download(self, stream: Any, host: np.ndarray, start: int) -> None:
        if self.left < 0:
            raise DeviceError(LOST)
        super().download(stream, host, start)


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 40)

    def run(name: str, card: Card | None = None, **options: Any) -> pf.Run:
        monkeypatch.setattr(cuda, "CudaDevice", lambda **_: card)
        config: dict[str, Any] = {
            "files": [str(text)], "out": str(tmp_path / name), "tokenizer": {"kind": "char"}, "max_steps": 8,
            "model": {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2}, "batch_size": 2, "seq_len": 8,
            "save_every": 3, "device": "cuda" if card else "cpu",
        }  # fmt: skip
        return pf.train(pf.TrainConfig(**{**config, **options}))

    return run


def losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def test_a_run_follows_that_of_the_cpu(train: Any, tmp_path: Path) -> None:
    want, got, fast = (
        train("cpu"),
        train("gpu", Card(None, 1 << 19)),
        train("bf16", Card(None, 1 << 19), bf16=True),
    )
    np.testing.assert_allclose(losses(tmp_path / "gpu"), losses(tmp_path / "cpu"), rtol=1e-4)
    np.testing.assert_allclose(losses(tmp_path / "bf16"), losses(tmp_path / "cpu"), rtol=2e-2)
    assert got.valid_loss == pytest.approx(want.valid_loss, rel=1e-4)
    assert fast.valid_loss == pytest.approx(want.valid_loss, rel=2e-2)
    assert "bfloat16 on cuda" in repr(fast.model)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the gradient of one update infinite."""
    ready = Passes.ready

    def go(step: int) -> None:
        def poisoned(self: Passes, batch: Any, draw: int, update: Update) -> Any:
            program, inputs = ready(self, batch, draw, update)
            if update.step == step:
                inputs["loss_scale"] = np.inf
            return program, inputs

        monkeypatch.setattr(Passes, "ready", poisoned)

    return go


@pytest.mark.parametrize("parts", [1, 2])
def test_an_update_that_is_not_finite_is_found_kept_and_left_out(
    train: Any, poison: Any, tmp_path: Path, parts: int
) -> None:
    poison(4)
    options = {"gradient_accumulation_steps": parts, "save_every": 2}
    with pytest.raises(NonFiniteError, match=r"loss_scale, which .* was not finite before.*kept in"):
        train("stop", Card(None, 1 << 20), **options)
    stopped = tmp_path / "stop" / "failed-step-5"
    kept, before = (f / "model.safetensors" for f in (stopped, tmp_path / "stop" / "checkpoint-4"))
    assert kept.read_bytes() == before.read_bytes()
    runs = {
        what: train(what, Card(None, 1 << 20), on_nonfinite=what, **options) for what in ("skip", "rollback")
    }
    cpu = train("cpu", on_nonfinite="skip", **options)
    want, got, back = (run.model.state_dict() for run in (cpu, *runs.values()))
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-3, atol=1e-5, err_msg=name)
        np.testing.assert_array_equal(back[name], got[name], err_msg=name)
    facts = [
        json.loads((tmp_path / out / "failed-step-5" / "failure.json").read_text()) for out in ("cpu", "skip")
    ]
    one, two = (f["finding"] for f in facts)
    assert all(one[key] == two[key] for key in ("program", "batch", "operation", "layer"))


def test_replay_makes_an_update_of_a_device_again(train: Any, tmp_path: Path) -> None:
    """Weights of 1e25 overflow in the first layer."""
    with pytest.raises(NonFiniteError, match=r"in h\.0.* made .* not finite"):
        train("run", Card(None, 1 << 19), bf16=True, learning_rate=1e25, max_grad_norm=0.0, warmup_steps=0)
    found, facts = replay(tmp_path / "run")
    assert found is not None
    assert dataclasses.asdict(found) == facts["finding"]


def test_a_lost_device_leaves_the_last_checkpoint(train: Any, tmp_path: Path) -> None:
    train("whole", Card(None, 1 << 19))
    with pytest.raises(DeviceError) as caught:
        train("lost", Mortal(4))
    assert str(caught.value) == LOST
    assert [p.name for p in (tmp_path / "lost").glob("checkpoint-*")] == ["checkpoint-3"]
    train("lost", Card(None, 1 << 19), resume=True)
    whole, resumed = (pf.load(tmp_path / name).state_dict() for name in ("whole", "lost"))
    for name, value in whole.items():
        np.testing.assert_array_equal(resumed[name], value, err_msg=name)
