"""Classes of texts and tokens: the same as the model's own logits give, whatever the batch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import pyrformer as pf
from pyrformer.cli import main
from pyrformer.errors import InputError

SIZES = {
    "model_type": "bert",
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 24,
}
NAMES = {"0": "bad", "1": "good", "2": "so-so"}
IDS = [[2, 7, 3], [2, *range(5, 24), 3], [2, 9, 9, 30, 3], [2, 3], [2, 7, 3]]


def model_of(kind: str, **more: object) -> pf.Model:
    config = {**SIZES, "architectures": [f"BertFor{kind}Classification"], "id2label": NAMES, **more}
    model = pf.Model.from_config(config, seed=3)
    # Heads begin near zero, where all classes are alike.
    rng = np.random.default_rng(0)
    model.load_state_dict(
        {k: v + rng.normal(0, 0.3, v.shape).astype(v.dtype) for k, v in model.state_dict().items()}
    )
    return model


@pytest.mark.parametrize("kind", ["Sequence", "Token"])
def test_equals_the_softmax_of_the_logits_one_by_one(kind: str) -> None:
    model = model_of(kind)
    found = model.classify(iter(IDS))
    for ids, got in zip(IDS, found.scores, strict=True):
        logits = np.asarray(model(np.array([ids])).logits, np.float64)[0]
        want = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_batch_does_not_matter() -> None:
    model = model_of("Sequence")
    together = model.classify(IDS)
    for ids, scores, label in zip(IDS, together.scores, together.labels, strict=True):
        alone = model.classify([ids])
        assert np.array_equal(alone.scores[0], scores)
        assert alone.labels == [label]


def test_several_labels_are_independent() -> None:
    model = model_of("Sequence", problem_type="multi_label_classification")
    logits = np.asarray(model(np.array([IDS[0]])).logits, np.float64)[0]
    np.testing.assert_allclose(model.classify(IDS[:1]).scores[0], 1 / (1 + np.exp(-logits)), rtol=1e-5)


def test_long_texts_are_cut_and_no_text_is_no_error() -> None:
    model = model_of("Token")
    assert model.classify([]).scores == []
    assert model.classify([[2] * 60]).scores[0].shape == (24, 3)


def test_only_one_label_of_several_can_be_learnt() -> None:
    model = model_of("Sequence", problem_type="multi_label_classification")
    with pytest.raises(pf.errors.ConfigError, match="no loss for problem_type"):
        model(np.arange(5, 9)[None], labels=np.array([1]))


def test_refusals() -> None:
    with pytest.raises(InputError, match="no classification head"):
        pf.Model.from_config({**SIZES, "architectures": ["BertForMaskedLM"]}).classify(IDS)
    with pytest.raises(InputError, match="quantities"):
        model_of("Sequence", problem_type="regression").classify(IDS)
    with pytest.raises(InputError, match="text 1 has no tokens"):
        model_of("Sequence").classify([[2, 3], []])


@pytest.mark.parametrize("kind", ["Sequence", "Token"])
def test_command(kind: str, tmp_path: Path) -> None:
    tokenizer = pf.Tokenizer.train(iter(["the cat sat on the mat"] * 9), preset="bert-uncased", vocab_size=40)
    model = model_of(kind, vocab_size=tokenizer.vocab_size)
    model.tokenizer = tokenizer
    model.save(tmp_path / "run")
    (tmp_path / "texts.txt").write_text("the cat\nthe mat sat\n")
    result = CliRunner().invoke(main, ["classify", str(tmp_path / "run"), str(tmp_path / "texts.txt")])
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    want = model.classify(["the cat", "the mat sat"])
    if kind == "Sequence":
        assert [line["label"] for line in lines] == want.labels
    else:
        assert [line["labels"] for line in lines] == want.labels
        assert lines[0]["tokens"][0] == "[CLS]"
