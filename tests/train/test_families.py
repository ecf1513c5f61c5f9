"""Every family trains from text, and models train in part: frozen, with low-rank changes, with a fresh head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyrformer as pf
from pyrformer.errors import Error
from pyrformer.models import FAMILIES

TEXT = "the cat sat on the mat, and the dog lay by the door. " * 40
OBJECTIVE = {"bert": "mlm", "roberta": "mlm", "distilbert": "mlm", "modernbert": "mlm", "xlnet": "plm"}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def options(text: Path, out: Path, kind: str, **more: Any) -> dict[str, Any]:
    """A tiny model of a family."""
    sizes = FAMILIES[kind][0].SIZES
    small = {sizes["layers"]: 2, sizes["width"]: 16, sizes["heads"]: 2}
    objective = OBJECTIVE.get(kind, "ar")
    masked = {"preset": "bert-uncased", "vocab_size": 80}
    return {
        "files": [str(text)],
        "out": str(out),
        "objective": objective,
        "model": {"model_type": kind, **small},
        "tokenizer": masked if objective == "mlm" else {"kind": "char"},
        "seq_len": 16,
        "batch_size": 4,
        "max_steps": 40,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "log_every": 1,
        "eval_every": 0,
        "seed": 3,
        **more,
    }


def losses(run: pf.Run) -> list[float]:
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_every_family_learns_and_resumes(text: Path, tmp_path: Path, kind: str) -> None:
    straight = pf.train(pf.TrainConfig(**options(text, tmp_path / "a", kind)))
    seen = losses(straight)
    # A random order of a short text is hard to guess.
    assert np.mean(seen[-5:]) < (0.95 if kind == "xlnet" else 0.8) * np.mean(seen[:5])

    def stop(event: str, numbers: dict[str, Any]) -> None:
        if event == "step" and numbers["step"] == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pf.train(pf.TrainConfig(**options(text, tmp_path / "b", kind)), stop)
    again = pf.train(pf.TrainConfig(**options(text, tmp_path / "b", kind, resume=True)))
    assert losses(again) == seen
    a, b = straight.model.state_dict(), pf.load(tmp_path / "b").state_dict()
    assert all(np.array_equal(a[name], b[name]) for name in a)
    ids = np.arange(12).reshape(2, 6) % 10
    assert np.allclose(straight.model(ids).logits, pf.load(tmp_path / "a")(ids).logits, atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_lora_changes_nothing_but_its_targets(text: Path, tmp_path: Path, kind: str) -> None:
    base = pf.train(pf.TrainConfig(**options(text, tmp_path / "base", kind, max_steps=5)))
    more = {"init_from": str(tmp_path / "base"), "model": {}, "tokenizer": {}, "lora": {"r": 2}}
    run = pf.train(pf.TrainConfig(**options(text, tmp_path / "tuned", kind, **more)))
    assert run.valid_loss < base.valid_loss
    tuned = pf.load(tmp_path / "tuned")
    before, after = base.model.state_dict(), tuned.state_dict()
    assert before.keys() == after.keys()
    for name in before:
        linear = before[name].ndim == 2 and "embed" not in name and ".wte" not in name and ".wpe" not in name
        assert linear or np.array_equal(before[name], after[name]), name
    ids = np.arange(12).reshape(2, 6) % 10
    assert np.allclose(run.model(ids).logits, tuned(ids).logits, atol=1e-4)
    with pytest.raises(Error, match="already"):
        run.model.add_lora()


def test_frozen_parameters_stay(text: Path, tmp_path: Path) -> None:
    base = pf.train(pf.TrainConfig(**options(text, tmp_path / "base", "gpt2", max_steps=5)))
    more = {
        "init_from": str(tmp_path / "base"),
        "model": {},
        "tokenizer": {},
        "freeze": ["transformer.h.0.*"],
    }
    run = pf.train(pf.TrainConfig(**options(text, tmp_path / "tuned", "gpt2", **more)))
    before, after = base.model.state_dict(), run.model.state_dict()
    for name in before:
        assert np.array_equal(before[name], after[name]) == name.startswith("transformer.h.0."), name


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
def test_texts_are_classified(tmp_path: Path, kind: str) -> None:
    rows = [
        {"text": f"the {a} {b}", "label": a}
        for a in ("red", "blue")
        for b in ("cat", "dog", "door", "mat", "house", "tree")
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows * 4), encoding="utf-8")
    more = {"objective": "sentence", "tokenizer": {"preset": "bert-uncased", "vocab_size": 60}}
    more["max_steps"] = 150
    run = pf.train(pf.TrainConfig(**options(path, tmp_path / "run", kind, **more)))
    assert run.valid_loss < 0.2
    model = pf.load(tmp_path / "run")
    assert model.config["id2label"] == {"0": "blue", "1": "red"}
    assert model.tokenizer is not None
    ids = np.array([model.tokenizer.encode(f"the {c} tree").ids for c in ("red", "blue")])
    assert model(ids).logits.argmax(-1).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"lora": {"rank": 3}}, "rank"),
        ({"lora": {"target_modules": ["nothing"]}}, "nothing"),
        ({"lora": {"r": 0}}, "r must"),
        ({"freeze": ["nothing.*"]}, "nothing"),
        ({"freeze": ["*"]}, "left to train"),
        ({"init_from": "nowhere"}, "nowhere"),
        ({"model": {"model_type": "parrot"}}, "parrot"),
        ({"model": {"model_type": "bert"}}, "mlm"),
        (
            {"objective": "sentence", "model": {"model_type": "bert"}},
            "row 1 of .*text.txt must have .* in 'label'",
        ),
    ],
)
def test_refusals(text: Path, tmp_path: Path, more: dict[str, Any], named: str) -> None:
    with pytest.raises(Error, match=named):
        pf.train(pf.TrainConfig(**options(text, tmp_path / "run", "gpt2", **more)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"model": {"model_type": "parrot"}}, "parrot"),
        ({"model": {"model_type": "bert"}}, "mlm"),
        ({"model": {"n_embd": 30, "n_head": 4}}, "n_embd"),
        ({"init_from": "gpt2", "model": {"n_head": 7}}, "n_head"),
    ],
)
def test_a_wrong_model_is_refused_before_any_text_is_read(
    text: Path, fixtures: Path, tmp_path: Path, more: dict[str, Any], named: str
) -> None:
    if "init_from" in more:
        more = {**more, "init_from": str(fixtures / "models" / more["init_from"])}
    seen: list[str] = []
    config = pf.TrainConfig(**{**options(text, tmp_path / "run", "gpt2"), **more})
    with pytest.raises(Error, match=named):
        pf.train(config, on_event=lambda kind, _numbers: seen.append(kind))
    assert not seen


def test_smoothing_and_z_loss_are_learnt_from(text: Path, tmp_path: Path) -> None:
    """They raise the loss that is trained on, and the held-out loss is measured without them."""
    plain = pf.train(pf.TrainConfig(**options(text, tmp_path / "a", "gpt2", max_steps=3)))
    extras = {"label_smoothing_factor": 0.2, "z_loss": 0.01}
    other = pf.train(pf.TrainConfig(**options(text, tmp_path / "b", "gpt2", max_steps=3, **extras)))
    assert losses(other)[0] > losses(plain)[0]
    ids = np.arange(12).reshape(2, 6) % 10
    assert not np.array_equal(other.model(ids).logits, plain.model(ids).logits)
    first = pf.train(pf.TrainConfig(**options(text, tmp_path / "c", "gpt2", max_steps=1, learning_rate=0.0)))
    same = {**extras, "max_steps": 1, "learning_rate": 0.0}
    again = pf.train(pf.TrainConfig(**options(text, tmp_path / "d", "gpt2", **same)))
    assert again.valid_loss == first.valid_loss


@pytest.mark.parametrize("kind", ["learned", "sinusoidal", "rope", "alibi", "none"])
def test_kinds_of_positions(text: Path, tmp_path: Path, kind: str) -> None:
    """A GPT-2 with any of them learns, and decoding with a cache gives what whole passes give."""
    given = options(text, tmp_path / "run", "gpt2")
    given["model"]["position_embedding_type"] = kind
    run = pf.train(pf.TrainConfig(**given))
    assert np.mean(losses(run)[-5:]) < 0.9 * np.mean(losses(run)[:5])
    model = pf.load(tmp_path / "run")
    new = model.generate([[3, 4, 5]], max_new_tokens=8).ids[0]
    ids = [3, 4, 5]
    for token in new:
        logits = model([ids]).logits[0, -1]
        assert logits[token] == pytest.approx(logits.max(), abs=1e-4)
        ids.append(token)
