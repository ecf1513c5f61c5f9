"""The pretended device against results of other libraries: logits, losses, gradients, training and beams.

Tolerances are those that the reference results state for float32: logits |a − b| ≤ 1e-4·|b| + 1e-5·max(1, max|b|), loss
1e-5 relative, gradients 1e-3 of the tensor's largest + 1e-6 of the largest of all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from sim.card import Card

import pyrformer as pf
from pyrformer import programs
from pyrformer.executors import cuda
from pyrformer.model import Model
from pyrformer.optimizers import AdamW

MODELS = [
    "bert_mlm", "bert_pretraining", "distilbert_mlm", "falcon_40b_style", "falcon_7b_style", "falcon_rw_style", "gpt2",
    "gpt_neox", "llama", "llama3_rope", "llama_gqa_tied", "mistral_window", "modernbert_mlm", "opt", "qwen2", "qwen3",
    "roberta_mlm", "xlnet",
]  # fmt: skip
INPUTS = (
    "input_ids", "attention_mask", "token_type_ids", "position_ids", "labels", "next_sentence_label", "perm_mask",
    "target_mapping",
)  # fmt: skip


@pytest.fixture(autouse=True)
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "CudaDevice", lambda **_: Card(None, 1 << 21))


def load(folder: Path) -> Model:
    return pf.load(folder, device="cuda")


def inputs(expected: dict[str, np.ndarray]) -> dict[str, Any]:
    given = {name: expected[name] for name in INPUTS if name in expected}
    mems = [expected[f"mems.{i}"] for i in range(9) if f"mems.{i}" in expected]
    return {**given, "mems": mems} if mems else given


def cases(folder: Path) -> Iterator[dict[str, np.ndarray]]:
    for path in sorted(folder.glob("expected*.safetensors")):
        yield load_file(path)


@pytest.mark.parametrize("name", MODELS)
def test_every_case_of_a_model(fixtures: Path, name: str) -> None:
    model = load(fixtures / "models" / name)
    for expected in cases(fixtures / "models" / name):
        out = model(**inputs(expected))
        seen = (
            expected["compare"].astype(bool) if "compare" in expected else np.ones(out.logits.shape[:2], bool)
        )
        got, want = out.logits[seen], expected["logits"][seen]
        assert np.isfinite(out.logits).all()
        assert (np.abs(got - want) <= 1e-4 * np.abs(want) + 1e-5 * max(1.0, np.abs(want).max())).all()
        if "loss" in expected:
            assert out.loss == pytest.approx(float(expected["loss"][0]), rel=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_every_gradient(fixtures: Path, name: str) -> None:
    folder = fixtures / "models" / name
    expected = load_file(folder / "expected.safetensors")
    loss, grads = load(folder).loss_and_grads(**inputs(expected))
    assert loss == pytest.approx(float(expected["loss"][0]), rel=1e-5)
    wanted = {k.removeprefix("grad."): v for k, v in expected.items() if k.startswith("grad.")}
    assert grads.keys() == wanted.keys()
    largest = max(np.abs(g).max() for g in wanted.values())
    for parameter, want in wanted.items():
        error = np.abs(grads[parameter] - want).max()
        assert error <= 1e-3 * np.abs(want).max() + 1e-6 * largest, parameter


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert_mlm"])
def test_five_training_steps(fixtures: Path, name: str) -> None:
    folder = fixtures / "models" / name
    trace = json.loads((folder / "expected.json").read_text())["training_trace"]
    tensors = load_file(folder / trace["file"])
    s = trace["settings"]
    optimizer = AdamW(*s["betas"], s["eps"], weight_decay=s["weight_decay"], max_grad_norm=s["clip"])
    model = load(folder)
    for step in range(s["steps"]):
        batch = model.batch(**{k: tensors[f"step{step}.{k}"] for k in INPUTS if f"step{step}.{k}" in tensors})
        run = model.program(
            ("train", batch.sizes), lambda b=batch: programs.train_step(model.family, b.sizes, optimizer)
        )
        out = run(**batch.arrays, loss_scale=1 / batch.labels, lr=s["lr"], step=step + 1)
        assert out["loss"] / batch.labels == pytest.approx(trace["loss"][step], rel=1e-4)
        assert out["grad_norm"] == pytest.approx(trace["grad_norm_before_clip"][step], rel=1e-4)
    weights = model.state_dict()
    for key, want in tensors.items():
        if key.startswith("final."):
            parameter = key.removeprefix("final.")
            stable = tensors.get(f"stable.{parameter}", np.ones_like(want)).astype(bool)
            assert np.abs(weights[parameter] - want)[stable].max(initial=0) <= 0.1 * s["lr"], parameter


def test_sequences_and_scores(fixtures: Path) -> None:
    """A case of each kind of search."""
    reference = json.loads((fixtures / "decoding" / "gpt2.json").read_text())
    model = load(fixtures / "models" / "gpt2")
    kinds: set[tuple[str, ...]] = set()
    for case in reference["cases"]:
        settings = {k: v for k, v in case["settings"].items() if k not in ("pad_token_id", "use_cache")}
        kind = tuple(sorted(set(settings) - {"max_new_tokens", "eos_token_id"}))
        if kind in kinds:
            continue
        kinds.add(kind)
        prompt = reference["prompts"][case["prompts"]]
        ids, mask = np.array(prompt["input_ids"]), np.array(prompt["attention_mask"])
        eos = settings.get("eos_token_id", model.generation_config["eos_token_id"])
        ends = [eos] if isinstance(eos, int) else eos
        out = model.generate(ids, attention_mask=mask, **settings)
        for got, want in zip(out.ids, case["sequences"], strict=True):
            new = want[ids.shape[1] :]
            stop = next((i + 1 for i, t in enumerate(new) if t in ends), len(new))
            assert got == new[:stop], case["name"]
        for got_score, score in zip(out.scores, case.get("sequences_scores") or [], strict=False):
            assert got_score == pytest.approx(score, abs=1e-4 * max(1, abs(score))), case["name"]
    assert len(kinds) > 5
