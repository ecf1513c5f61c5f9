"""`pf.train` on the pretended device: as on the CPU, in bfloat16, and when the device is lost in mid-run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sim.card import Card

import pyrformer as pf
from pyrformer.errors import DeviceError
from pyrformer.executors import cuda

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
        return pf.train(pf.TrainConfig(**config, **options))

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
