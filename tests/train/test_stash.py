"""Activations kept in bfloat16 for the backward pass: less memory, the same loss, slightly rounded gradients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyrformer as pf

TEXT = "the cat sat on the mat, and the dog lay by the door. " * 60
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2},
    "llama": {"model_type": "llama", **SIZES, "max_position_embeddings": 64},
    "bert": {"model_type": "bert", **SIZES, "max_position_embeddings": 64},
    "modernbert": {"model_type": "modernbert", **SIZES, "max_position_embeddings": 64},
    "xlnet": {"model_type": "xlnet", "n_layer": 2, "d_model": 32, "n_head": 2, "d_inner": 64},
}
OBJECTIVES = {"bert": "mlm", "modernbert": "mlm", "xlnet": "plm"}


def config(folder: Path, out: str, family: str, **more: Any) -> pf.TrainConfig:
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    objective = OBJECTIVES.get(family, "ar")
    kind = {"preset": "bert-uncased", "vocab_size": 80} if objective != "ar" else {"kind": "char"}
    small = {
        "seq_len": 32,
        "batch_size": 4,
        "max_steps": 12,
        "warmup_steps": 1,
        "save_every": 0,
        "log_every": 1,
    }
    return pf.TrainConfig(
        files=[str(folder / "text.txt")],
        out=str(folder / out),
        objective=objective,
        model=MODELS[family],
        tokenizer=kind,
        **{**small, **more},
    )


def train(c: pf.TrainConfig) -> tuple[list[float], list[str], bytes]:
    """The losses, what was said, the weights."""
    said: list[str] = []
    pf.train(c, lambda kind, n: said.append(n["what"]) if kind == "note" else None)
    rows = [json.loads(line) for line in (Path(c.out) / "metrics.jsonl").read_text("utf-8").splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    return losses, said, (Path(c.out) / "model.safetensors").read_bytes()


def megabytes(said: str) -> tuple[float, float]:
    """Predicted with and without, of the note before the first update."""
    words = said.replace(",", "").split()
    found = [float(words[i - 1]) for i, word in enumerate(words) if word == "MB"]
    return found[0], found[1]


@pytest.mark.parametrize("family", sorted(MODELS))
def test_losses_follow_those_of_float32(tmp_path: Path, family: str) -> None:
    exact, silence, weights = train(config(tmp_path, "exact", family))
    got, said, rounded = train(config(tmp_path, "rounded", family, bf16=True))
    assert not silence
    assert len(said) == 1
    assert "bfloat16" in said[0]
    assert got[0] == exact[0]
    assert rounded != weights
    np.testing.assert_allclose(got, exact, rtol=0.02)
    assert got[-1] < got[0]


def test_less_memory_and_less_again_where_layers_are_recomputed(tmp_path: Path) -> None:
    large = {**MODELS["gpt2"], "n_embd": 256, "n_head": 4}
    more: dict[str, Any] = {"model": large, "bf16": True, "max_steps": 1, "batch_size": 16}
    notes = []
    for out, recompute in (("kept", False), ("again", True)):
        c = config(tmp_path, out, "gpt2", recompute=recompute)
        notes.append(megabytes(train(pf.TrainConfig(**{**vars(c), **more}))[1][0]))
    (kept, full), (again, same) = notes
    assert full == same
    assert again < kept < 0.9 * full


@pytest.mark.parametrize("more", [{}, {"gradient_accumulation_steps": 2}, {"recompute": True}])
def test_a_run_that_goes_on_ends_with_the_same_bits(tmp_path: Path, more: dict[str, Any]) -> None:
    more = {**more, "bf16": True, "lr_scheduler_type": "constant"}
    straight = train(config(tmp_path, "straight", "gpt2", threads=1, **more))
    train(config(tmp_path, "parts", "gpt2", threads=2, **more, max_steps=5))
    second = config(tmp_path, "parts", "gpt2", threads=2, **more, resume=True)
    assert train(second)[2] == straight[2]


def test_weights_to_begin_with_may_come_from_a_folder(tmp_path: Path) -> None:
    _, _, weights = train(config(tmp_path, "base", "gpt2", max_steps=2))
    c = config(tmp_path, "more", "gpt2", bf16=True, init_from=str(tmp_path / "base"), max_steps=2)
    losses, said, tuned = train(pf.TrainConfig(**{**vars(c), "model": {}, "tokenizer": {}}))
    assert "bfloat16" in said[0]
    assert tuned != weights
    assert np.isfinite(losses).all()


def test_gradients_of_a_model_that_keeps_bfloat16(tmp_path: Path) -> None:
    train(config(tmp_path, "run", "llama", max_steps=2))
    exact = pf.load(tmp_path / "run")
    rounded = pf.Model.from_config(exact.config, precision="bfloat16")
    for name, _ in exact.family.named_parameters():
        rounded.store.set(name, exact.store.get(name))
    ids = np.arange(24).reshape(2, 12) % exact.family.config.vocab_size
    (loss, want), (same, got) = (m.loss_and_grads(ids, ids) for m in (exact, rounded))
    assert loss == same
    for name, g in want.items():
        off = np.linalg.norm(got[name] - g) / np.linalg.norm(g)
        assert off < 0.01, name
    assert any((got[name] != g).any() for name, g in want.items())


def test_computing_in_16_bits_needs_tensor_cores(tmp_path: Path) -> None:
    train(config(tmp_path, "run", "gpt2", max_steps=1))
    for dtype in ("bfloat16", "float16"):
        with pytest.raises(pf.Error, match=f"{dtype} is computed on tensor cores only"):
            pf.load(tmp_path / "run", dtype=dtype)
    model = pf.Model.from_config(pf.load(tmp_path / "run").config, precision="float16")
    with pytest.raises(pf.Error, match="float16 is computed on CUDA only"):
        model(np.zeros((1, 3), int))
    model = pf.Model.from_config(model.config, precision="half")
    with pytest.raises(pf.Error, match=r"must be one of .*'float16'.*, got 'half'"):
        model(np.zeros((1, 3), int))
