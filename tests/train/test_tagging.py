"""Classes of words: read, aligned with tokens, learned from the command, found again, measured."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import pyrformer as pf
from pyrformer.cli import main
from pyrformer.data.tagging import Tagged, chunks, entities, figures, first_tokens, read_tagged
from pyrformer.errors import Error

NAMES, PLACES = ["anna", "bob", "carl", "dora"], ["new york", "rome", "paris", "los angeles"]


def write(path: Path, rows: int, *, conll: bool = False) -> Path:
    draws = np.random.default_rng(3)
    lines = []
    for _ in range(rows):
        name, place = NAMES[draws.integers(4)], PLACES[draws.integers(4)].split()
        words = [name, "went", "to", *place, "today"]
        labels = ["B-PER", "O", "O", "B-LOC", *["I-LOC"] * (len(place) - 1), "O"]
        if conll:
            lines += [f"{w} NN {x}" for w, x in zip(words, labels, strict=True)] + [""]
        else:
            lines.append(json.dumps({"tokens": words, "ner_tags": labels}))
    path.write_text("\n".join(lines) + "\n")
    return path


def test_reading(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.jsonl", 5), write(tmp_path / "b.conll", 5, conll=True)
    assert read_tagged([str(a)]) == read_tagged([str(b)])
    for line in (
        '{"tokens": ["a"], "labels": [1, 2]}',
        '{"tokens": ["a"]}',
        "[]",
        "{",
        '{"tokens": [1], "tags": [1]}',
    ):
        (tmp_path / "bad.jsonl").write_text('{"tokens": ["a"], "tags": [0]}\n' + line)
        with pytest.raises(Error, match=r"bad.jsonl:2"):
            read_tagged([str(tmp_path / "bad.jsonl")])
    with pytest.raises(Error, match="nowhere"):
        read_tagged([str(tmp_path / "nowhere.jsonl")])


@pytest.mark.parametrize("preset", ["bert-uncased", "gpt2"])
def test_words_are_learned_at_their_first_tokens(preset: str) -> None:
    tok = pf.Tokenizer.train(iter(["anna went to new york today"] * 3), preset=preset, vocab_size=290)
    row = Tagged(["Zanna", "went", "to", "yorkzz", "\u00e9"], ["a"] * 5)
    ids, places = first_tokens(tok, row, 100)
    encoding = tok.encode(row.text)
    assert ids == encoding.ids
    for (start, end), place in zip(row.spans, places, strict=True):
        inside = [i for i, (a, b) in enumerate(encoding.offsets) if b > a and start < b <= end]
        assert place == (inside[0] if inside else None)
    ids, places = first_tokens(tok, row, 4)
    assert len(ids) == 4
    assert places[-1] is None


def test_entities_and_figures() -> None:
    labels = ["B-A", "I-A", "I-B", "O", "B-B", "B-B", "C", "C"]
    text = "a b c d e f g h"
    spans = [(2 * i, 2 * i + 1) for i in range(8)]
    found = entities(text, spans, labels, np.full(8, 0.5))
    assert [(e.entity_group, e.word) for e in found] == [
        ("A", "a b"), ("B", "c"), ("B", "e"), ("B", "f"), ("C", "g h"),
    ]  # fmt: skip
    assert chunks(labels) == {("A", 0, 2), ("B", 2, 3), ("B", 4, 5), ("B", 5, 6), ("C", 6, 8)}
    got = figures([(labels, ["B-A", "I-A", "O", "O", "B-B", "I-B", "C", "C"])])
    assert (got.entities, got.accuracy) == (5, 6 / 8)
    assert (got.precision, got.recall) == (2 / 3, 2 / 5)
    assert got.f1 == pytest.approx(0.5)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "modernbert"])
def test_from_the_command(tmp_path: Path, family: str) -> None:
    train, valid = write(tmp_path / "train.jsonl", 60), write(tmp_path / "valid.conll", 12, conll=True)
    steps = "60" if family == "modernbert" else "2"
    arguments = ["train", str(train), "--valid", str(valid), "--objective", "tokens", "--family", family]
    arguments += [
        "--out",
        str(tmp_path / "run"),
        "--vocab-size",
        "80",
        "--layers",
        "1",
        "--width",
        "32",
        "--heads",
        "2",
    ]
    arguments += ["--seq-len", "24", "--batch-size", "16", "--max-steps", steps, "--learning-rate", "5e-3"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    model = pf.load(tmp_path / "run")
    assert model.config["id2label"] == {"0": "B-LOC", "1": "B-PER", "2": "I-LOC", "3": "O"}
    done = CliRunner().invoke(main, ["eval", str(tmp_path / "run"), str(valid), "--json"])
    found = json.loads(done.stdout)
    assert found["objective"] == "tokens"
    assert found["entities"] == 24
    (tmp_path / "t.txt").write_text("bob went to los angeles today\n")
    done = CliRunner().invoke(main, ["classify", str(tmp_path / "run"), str(tmp_path / "t.txt")])
    assert done.exit_code == 0, done.output
    row = json.loads(done.stdout)
    assert row["labels"] == model.classify([row["text"]]).labels[0]
    if family == "modernbert":
        assert found["f1"] > 0.9
        got = {(e["entity_group"], e["word"]) for e in row["entities"]}
        assert {("PER", "bob"), ("LOC", "los angeles")} <= got
        assert all(row["text"][e["start"] : e["end"]] == e["word"] for e in row["entities"])


def test_refusals(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", 10)
    arguments = [
        "train",
        str(train),
        "--objective",
        "tokens",
        "--out",
        str(tmp_path / "run"),
        "--max-steps",
        "1",
    ]
    done = CliRunner().invoke(main, [*arguments, "--family", "gpt2"])
    assert done.exit_code == 2
    assert "no head that classifies tokens" in done.output
    (tmp_path / "other.jsonl").write_text('{"tokens": ["x"], "labels": ["B-ODD"]}\n')
    done = CliRunner().invoke(main, [*arguments, "--valid", str(tmp_path / "other.jsonl")])
    assert done.exit_code == 2
    assert "B-ODD" in done.output
