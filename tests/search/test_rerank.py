"""Minimum Bayes risk, its utilities against reference values."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import pyrformer as pf
from pyrformer.cli import main
from pyrformer.generation.rerank import chrf, f1


@pytest.mark.parametrize(
    ("sample", "reference", "score"),
    [  # sacrebleu 2.5, CHRF().sentence_score
        ("the cat sat on the mat", "a cat sat on a mat", 0.551117),
        ("hello", "hello world", 0.406908),
        ("to be or not to be", "be to not or be to", 0.279040),
        ("ab", "abc", 0.636364),
        ("completely different", "nothing alike, this", 0.067050),
        ("Grüße aus Köln", "Grüsse aus Koeln", 0.321438),
    ],
)
def test_chrf_is_the_references(sample: str, reference: str, score: float) -> None:
    assert chrf(sample, reference) == pytest.approx(score, abs=1e-6)


def test_f1_counts_words() -> None:
    assert f1("a b b", "b b c c") == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert (f1("", ""), f1("a", ""), chrf("", ""), chrf("", "a")) == (1.0, 0.0, 1.0, 0.0)


def test_the_sample_most_like_the_others_wins() -> None:
    texts = ["the cat sat", "a dog ran off", "the cat sat down", "the cat sat"]
    ranking = pf.mbr(texts, "f1")
    assert ranking.best == 0
    assert ranking.order == [0, 3, 2, 1]
    assert ranking.scores[0] == pytest.approx(sum(f1("the cat sat", t) for t in texts) / 4)
    assert pf.mbr(texts, lambda a, b: float(len(a))).best == 2
    assert pf.mbr(texts, weights=[0, 1, 0, 0]).best == 1
    for arguments in (([],), ("text",), (texts, "bleu")):
        with pytest.raises(pf.errors.InputError, match="mbr"):
            pf.mbr(*arguments)
    with pytest.raises(pf.errors.InputError, match="weights"):
        pf.mbr(texts, weights=[1, 2])


def test_the_command_prints_the_best(fixtures: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the cat sat on the mat")
    tokenizer = pf.Tokenizer.train([tmp_path / "text.txt"], kind="char", vocab_size=40)
    config = {
        **pf.load(fixtures / "models" / "gpt2").config,
        "vocab_size": tokenizer.vocab_size,
        "eos_token_id": None,
    }
    model = pf.Model.from_config(config, seed=3)
    model.tokenizer = tokenizer
    model.save(tmp_path / "run")
    command = ["sample", str(tmp_path / "run"), "the ", "-n", "6", "--max-new-tokens", "8", "--json"]
    texts = [json.loads(line)["text"] for line in CliRunner().invoke(main, command).stdout.splitlines()]
    best = CliRunner().invoke(main, [*command, "--mbr", "chrf"]).stdout
    assert json.loads(best)["text"] == texts[pf.mbr(texts).best]
    assert CliRunner().invoke(main, [*command[:3], "--mbr", "f1"]).exit_code == 2
