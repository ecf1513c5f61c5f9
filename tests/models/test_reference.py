"""Models against reference results: logits, hidden states, loss, every gradient, and traces of training.

Tolerances are those the fixtures state for a float32 implementation: logits and states |a − b| ≤ 1e-4·|b| + 1e-5·max(1,
max|b|), loss 1e-5 relative, gradients |a − b| ≤ 1e-3·max|b| of the tensor + 1e-6·max|b| of all tensors.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import pyrformer as pf
from pyrformer import programs
from pyrformer.optimizers import AdamW

MODELS = {
    "bert_mlm": ["no_mask_no_types"],
    "bert_pretraining": [],
    "distilbert_mlm": [],
    "falcon_40b_style": [],
    "falcon_7b_style": ["left_pad"],
    "falcon_rw_style": ["left_pad"],
    "gpt2": ["left_pad", "packed"],
    "gpt_neox": ["left_pad"],
    "llama": ["left_pad", "packed"],
    "llama3_rope": [],
    "llama_gqa_tied": ["left_pad"],
    "mistral_window": ["left_pad"],
    "modernbert_mlm": [],
    "opt": ["left_pad"],
    "qwen2": [],
    "qwen3": [],
    "roberta_mlm": [],
    "xlnet": ["plain", "mems"],
}
CASES = [
    (name, case) for name, more in MODELS.items() for case in ("expected", *(f"expected_{m}" for m in more))
]
TRACED = ["gpt2", "llama", "bert_mlm"]
INPUTS = (
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "position_ids",
    "labels",
    "next_sentence_label",
    "perm_mask",
    "target_mapping",
)


def close(got: np.ndarray, want: np.ndarray, what: str) -> None:
    bound = 1e-4 * np.abs(want) + 1e-5 * max(1.0, np.abs(want).max())
    worst = np.abs(got - want) / bound
    assert np.isfinite(got).all(), f"{what}: not finite"
    assert worst.max() <= 1.0, f"{what}: {worst.max():.1f} times the tolerance"


def inputs(expected: dict[str, np.ndarray]) -> dict[str, Any]:
    given = {name: expected[name] for name in INPUTS if name in expected}
    mems = [expected[f"mems.{i}"] for i in range(9) if f"mems.{i}" in expected]
    return {**given, "mems": mems} if mems else given


@pytest.mark.parametrize(("name", "case"), CASES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_logits_states_and_loss(fixtures: Path, name: str, case: str, dtype: str) -> None:
    folder = fixtures / "models" / name
    expected = load_file(folder / f"{case}.safetensors")
    out = pf.load(folder, dtype=dtype)(**inputs(expected), output_hidden_states=True)
    seen = expected["compare"].astype(bool) if "compare" in expected else np.ones(out.logits.shape[:2], bool)
    close(out.logits[seen], expected["logits"][seen], "logits")
    assert np.isfinite(out.logits).all()
    for i, state in enumerate(out.hidden_states or []):
        if f"hidden.{i}" in expected and state.shape[:2] != seen.shape:
            # XLNet's content stream, beside the targets that are compared: what is not padding.
            real = expected["attention_mask"].astype(bool)
            close(state[real], expected[f"hidden.{i}"][real], f"hidden.{i}")
        elif f"hidden.{i}" in expected:
            close(state[seen], expected[f"hidden.{i}"][seen], f"hidden.{i}")
    if "seq_relationship_logits" in expected:
        close(out.seq_relationship_logits, expected["seq_relationship_logits"], "seq_relationship_logits")
    if "loss" in expected:
        assert out.loss == pytest.approx(float(expected["loss"][0]), rel=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_every_gradient(fixtures: Path, name: str) -> None:
    folder = fixtures / "models" / name
    expected = load_file(folder / "expected.safetensors")
    loss, grads = pf.load(folder).loss_and_grads(**inputs(expected))
    assert loss == pytest.approx(float(expected["loss"][0]), rel=1e-5)
    wanted = {k.removeprefix("grad."): v for k, v in expected.items() if k.startswith("grad.")}
    assert grads.keys() == wanted.keys()
    largest = max(np.abs(g).max() for g in wanted.values())
    for parameter, want in wanted.items():
        error = np.abs(grads[parameter] - want).max()
        assert error <= 1e-3 * np.abs(want).max() + 1e-6 * largest, parameter


@pytest.mark.parametrize("name", TRACED)
@pytest.mark.parametrize("accumulate", [False, True])
def test_five_training_steps(fixtures: Path, name: str, accumulate: bool) -> None:
    """The stored trace, by the one-plan step and by accumulation of single rows weighted by their labels."""
    folder = fixtures / "models" / name
    trace = json.loads((folder / "expected.json").read_text())["training_trace"]
    tensors = load_file(folder / trace["file"])
    s = trace["settings"]
    optimizer = AdamW(
        s["betas"][0], s["betas"][1], s["eps"], weight_decay=s["weight_decay"], max_grad_norm=s["clip"]
    )
    model = pf.load(folder)
    for step in range(s["steps"]):
        arrays = {k: tensors[f"step{step}.{k}"] for k in INPUTS if f"step{step}.{k}" in tensors}
        whole = model.batch(**arrays)
        hyper = {"lr": s["lr"], "step": step + 1}
        if accumulate:
            loss = 0.0
            for i in range(whole.sizes.batch):
                part = model.batch(**{k: v[i : i + 1] for k, v in arrays.items()})
                run = model.program(
                    ("accumulate", part.sizes), lambda p=part: programs.accumulate_step(model.family, p.sizes)
                )
                loss += float(run(**part.arrays, loss_scale=1 / whole.labels)["loss"])
            out = model.program(("apply",), lambda: programs.apply_step(model.family, optimizer))(**hyper)
        else:
            run = model.program(
                ("train", whole.sizes), lambda w=whole: programs.train_step(model.family, w.sizes, optimizer)
            )
            out = run(**whole.arrays, loss_scale=1 / whole.labels, **hyper)
            loss = float(out["loss"])
        assert loss / whole.labels == pytest.approx(trace["loss"][step], rel=1e-4)
        assert float(out["grad_norm"]) == pytest.approx(trace["grad_norm_before_clip"][step], rel=1e-4)
    weights = model.state_dict()
    for key, want in tensors.items():
        if key.startswith("final."):
            parameter = key.removeprefix("final.")
            stable = tensors.get(f"stable.{parameter}", np.ones_like(want)).astype(bool)
            assert np.abs(weights[parameter] - want)[stable].max(initial=0) <= 0.1 * s["lr"], parameter


@pytest.mark.parametrize("name", ["gpt2_hub_names", "bert_hub_names"])
def test_files_with_the_names_first_published(fixtures: Path, name: str) -> None:
    other = {"gpt2_hub_names": "gpt2", "bert_hub_names": "bert_mlm"}[name]
    note = json.loads((fixtures / "layouts" / name / "expected.json").read_text())
    a, b = (
        pf.load(fixtures / "layouts" / name).state_dict(),
        pf.load(fixtures / "models" / other).state_dict(),
    )
    assert a.keys() == b.keys(), note
    for key in a:
        assert np.array_equal(a[key], b[key]), key


@pytest.mark.parametrize("name", MODELS)
def test_older_keys_describe_the_same_model(fixtures: Path, name: str, tmp_path: Path) -> None:
    folder = fixtures / "models" / name
    if not (folder / "config_legacy.json").is_file():
        pytest.skip(f"{name} has no configuration with older keys")
    for file, source in [("config.json", "config_legacy.json"), ("model.safetensors", "model.safetensors")]:
        (tmp_path / file).write_bytes((folder / source).read_bytes())
    expected = load_file(folder / "expected.safetensors")
    logits = [pf.load(f)(**inputs(expected)).logits for f in (folder, tmp_path)]
    assert np.array_equal(*logits)


def test_shards_in_bfloat16(fixtures: Path, tmp_path: Path) -> None:
    folder = fixtures / "layouts" / "llama_sharded_bf16"
    expected = load_file(folder / "expected.safetensors")
    model = pf.load(folder)
    out = model(**inputs(expected))
    close(out.logits, expected["logits"], "logits")
    assert out.loss == pytest.approx(float(expected["loss"][0]), rel=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_is_the_same_model(fixtures: Path, name: str, tmp_path: Path) -> None:
    model = pf.load(fixtures / "models" / name)
    model.save(tmp_path / "copy")
    again = pf.load(tmp_path / "copy")
    assert again.config == model.config
    for key, value in model.state_dict().items():
        assert np.array_equal(value, again.state_dict()[key]), key
