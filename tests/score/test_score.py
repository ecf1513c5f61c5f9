"""Scores and vectors of texts against reference values, and the laws that they keep."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyrformer as pf
from pyrformer.errors import Error
from pyrformer.evaluate import evaluate, independence_gap


@pytest.fixture
def reference(fixtures: Path) -> dict[str, Any]:
    return json.loads((fixtures / "scoring" / "scoring.json").read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    text = folder / "text.txt"
    text.write_text("the cat sat on the mat, and the dog lay by the door. " * 60, encoding="utf-8")
    small = {"files": [str(text)], "seq_len": 32, "batch_size": 8, "max_steps": 60, "learning_rate": 1e-2}
    ar = {"model": {"n_layer": 1, "n_embd": 32, "n_head": 2}, "tokenizer": {"kind": "char"}}
    mlm = {
        "objective": "mlm",
        "model": {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "model_type": "bert"},
        "tokenizer": {"preset": "bert-uncased", "vocab_size": 60},
    }
    pf.train(pf.TrainConfig(out=str(folder / "ar"), **small, **ar))
    pf.train(pf.TrainConfig(out=str(folder / "mlm"), **small, **mlm))
    return folder


def test_token_logprobs(fixtures: Path, reference: dict[str, Any]) -> None:
    model = pf.load(fixtures / reference["gpt2_model"])
    scores = model.score([s["input_ids"] for s in reference["gpt2_sequences"]])
    for got, want in zip(scores.token_logprobs, reference["gpt2_sequences"], strict=True):
        np.testing.assert_allclose(got, want["token_logprobs"], rtol=1e-5, atol=1e-5)
    assert scores.perplexity == pytest.approx(reference["gpt2_corpus"]["perplexity"], rel=1e-5)


def test_windows(fixtures: Path, reference: dict[str, Any]) -> None:
    model = pf.load(fixtures / reference["gpt2_model"])
    for case in reference["gpt2_windows"]:
        options = {"context": case["context"], "stride": case["stride"]}
        scores = model.score([reference["gpt2_long_input_ids"]], **options)
        assert scores.tokens.tolist() == [case["n_scored"]]
        np.testing.assert_allclose(scores.token_logprobs[0], case["token_logprobs"], rtol=1e-5, atol=1e-5)
        assert scores.perplexity == pytest.approx(case["perplexity"], rel=1e-5)


def test_pseudo_log_likelihood(fixtures: Path, reference: dict[str, Any]) -> None:
    model = pf.load(fixtures / reference["bert_model"])
    ids = [s["input_ids"] for s in reference["bert_sequences"]]
    scores = model.score(ids, mask_token_id=reference["bert_mask_id"])
    for got, want in zip(scores.token_logprobs, reference["bert_sequences"], strict=True):
        np.testing.assert_allclose(got, want["token_logprobs"], rtol=1e-5, atol=1e-5)
    assert scores.perplexity == pytest.approx(reference["bert_corpus"]["pseudo_perplexity"], rel=1e-5)


@pytest.mark.parametrize(
    "name", ["gpt2", "llama_gqa_tied", "falcon_rw_style", "mistral_window", "opt", "xlnet"]
)
def test_what_is_beside_a_text_does_not_matter(fixtures: Path, name: str) -> None:
    model = pf.load(fixtures / "models" / name)
    rng = np.random.default_rng(3)
    ids = [rng.integers(6, 200, int(n)).tolist() for n in rng.integers(2, 60, 30)]
    together = model.score(ids)
    for i in (0, 7, 29):
        alone = model.score([ids[i]])
        assert np.array_equal(alone.token_logprobs[0], together.token_logprobs[i])


@pytest.mark.parametrize("name", ["gpt2", "llama", "falcon_7b_style"])
def test_probabilities_sum_to_one(fixtures: Path, name: str) -> None:
    """Over all continuations by one token: Σ p(x | prefix) = 1."""
    model = pf.load(fixtures / "models" / name)
    vocab = model.config["vocab_size"]
    scores = model.score([[7, 12, 9, v] for v in range(vocab)])
    assert np.exp([x[-1] for x in scores.token_logprobs]).sum() == pytest.approx(1.0, abs=1e-5)


def test_permutation_models_score_from_left_to_right(fixtures: Path) -> None:
    model = pf.load(fixtures / "models" / "xlnet")
    ids = [9, 17, 33, 80, 41]
    scores = model.score([ids])
    for t in range(1, 5):
        hidden = np.triu(np.ones((5, 5)))[None]
        target = np.eye(5)[None, t : t + 1]
        logits = model([ids], perm_mask=hidden, target_mapping=target).logits[0, 0].astype(np.float64)
        want = logits[ids[t]] - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
        assert scores.token_logprobs[0][t - 1] == pytest.approx(want, abs=1e-5)


def test_vectors(fixtures: Path) -> None:
    model = pf.load(fixtures / "models" / "bert_mlm")
    ids = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16], [5]]
    for pooling in ("mean", "cls", "last"):
        found = model.embed(ids, pooling=pooling, normalize=False)
        for row, text in zip(found, ids, strict=True):
            hidden = model([text]).hidden[0]
            want = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[pooling]
            np.testing.assert_allclose(row, want, atol=1e-5)
    assert np.allclose(np.linalg.norm(model.embed(ids), axis=1), 1)
    assert model.embed([]).shape[0] == 0


def test_evaluation(runs: Path) -> None:
    texts = ["the cat sat on the mat.", "the dog lay by the door."]
    ar, mlm = pf.load(runs / "ar"), pf.load(runs / "mlm")
    exact, pseudo = evaluate(ar, texts), evaluate(mlm, texts)
    assert exact.bytes == pseudo.bytes == 47
    for found in (exact, pseudo):
        assert found.perplexity == pytest.approx(math.exp(-found.log_likelihood / found.tokens))
        assert found.bits_per_byte == pytest.approx(-found.log_likelihood / math.log(2) / 47)
    assert exact.masked_accuracy is None
    assert 0 <= (pseudo.masked_accuracy or -1) <= 1
    nonsense = evaluate(ar, ["tac eht tas no eht tam,"])
    assert nonsense.bits_per_byte > exact.bits_per_byte
    gap = independence_gap(mlm, texts, length=2, spans=10)
    assert gap.spans == 10
    # One token alone is its own chain.
    assert independence_gap(mlm, texts, length=1, spans=5).gap == pytest.approx(0, abs=1e-6)


def test_refusals(fixtures: Path, runs: Path) -> None:
    gpt2 = pf.load(fixtures / "models" / "gpt2")
    for options, named in [
        ({"stride": 0}, "stride"),
        ({"stride": 65}, "stride"),
        ({"context": 2}, "context"),
    ]:
        with pytest.raises(Error, match=named):
            gpt2.score([[1, 2]], **options)
    with pytest.raises(Error, match="tokenizer"):
        gpt2.score(["a text"])
    with pytest.raises(Error, match="one text"):
        gpt2.score("a text")
    with pytest.raises(Error, match="ids must be"):
        gpt2.score([[1, 500]])
    with pytest.raises(Error, match="pooling"):
        gpt2.embed([[1, 2]], pooling="max")
    with pytest.raises(Error, match="mask"):
        pf.load(fixtures / "models" / "bert_mlm").score([[1, 2, 3]])
    with pytest.raises(Error, match="masked models"):
        independence_gap(pf.load(runs / "ar"), ["the cat"])
