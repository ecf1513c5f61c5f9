"""Texts under a grammar: what comes out follows it, whatever the strategy."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import pyrformer as pf
from pyrformer.cli import main
from pyrformer.generation.grammar import token_bytes

pytest.importorskip("llguidance", reason="needs the extra pyrformer[grammar]")

CORPUS = 'the cat sat on {"name": "Ann", "age": 12, "tags": [1, 2]} — naïve café, 2024-05-06 17:30. ' * 8


@pytest.fixture(scope="module")
def model(fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> pf.Model:
    folder = tmp_path_factory.mktemp("grammar")
    (folder / "text.txt").write_text(CORPUS, encoding="utf-8")
    tokenizer = pf.Tokenizer.train([folder / "text.txt"], kind="bpe", vocab_size=300)
    config = pf.load(fixtures / "models" / "gpt2").config
    config |= {
        "vocab_size": tokenizer.vocab_size + 5,
        "eos_token_id": None,
        "bos_token_id": None,
        "n_positions": 256,
    }
    model = pf.Model.from_config(config, seed=1)
    model.tokenizer = tokenizer
    return model


STRATEGIES: list[dict[str, Any]] = [
    {},
    {"do_sample": True, "num_return_sequences": 4, "seed": 3},
    {"num_beams": 3, "num_return_sequences": 3},
    {"prompt_lookup_num_tokens": 4},
    {"penalty_alpha": 0.6, "top_k": 4},
]


@pytest.mark.parametrize("options", STRATEGIES)
def test_texts_match_the_expression(model: pf.Model, options: dict[str, Any]) -> None:
    expression = r"[0-9]{4}-[0-9]{2}-[0-9]{2}( (sat|café))?\."
    out = model.generate(["the cat", "on 2024"], regex=expression, max_new_tokens=40, **options)
    for text, reason in zip(out.texts, out.finish_reasons, strict=True):
        assert re.fullmatch(expression, text), text
        assert reason == "stop"


def test_a_grammar_may_end_where_it_is_satisfied(model: pf.Model) -> None:
    assert model.tokenizer is not None
    end = model.tokenizer.encode("c", add_special_tokens=False).ids
    samples: dict[str, Any] = {"do_sample": True, "num_return_sequences": 20, "seed": 1, "max_new_tokens": 30}
    out = model.generate("the", regex="a{1,9}", eos_token_id=end, **samples)
    stopped = {
        text.rstrip("c")
        for text, reason in zip(out.texts, out.finish_reasons, strict=True)
        if reason == "stop"
    }
    assert len(stopped) > 1
    assert all(re.fullmatch("a{1,9}", text) for text in stopped)


def test_texts_fit_the_schema(model: pf.Model) -> None:
    schema = {
        "type": "object",
        "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}, "ok": {"type": "boolean"}},
        "required": ["age", "ok"],
        "additionalProperties": False,
    }
    options: dict[str, Any] = {"do_sample": True, "num_return_sequences": 5, "max_new_tokens": 120}
    for given in (schema, json.dumps(schema)):
        out = model.generate("x", json_schema={**schema, "x-guidance": {"whitespace_flexible": False}}
                             if given is schema else given, **options)  # fmt: skip
        finished = [t for t, reason in zip(out.texts, out.finish_reasons, strict=True) if reason == "stop"]
        assert finished
        for text in finished:
            value = json.loads(text)
            assert value.keys() == {"age", "ok"}
            assert 0 <= value["age"] <= 99
            assert isinstance(value["ok"], bool)


def test_texts_follow_a_context_free_grammar(model: pf.Model) -> None:
    lark = 'start: "(" start ")" | "x"'
    out = model.generate("y", grammar=lark, do_sample=True, num_return_sequences=8, max_new_tokens=60, seed=2)
    for text, reason in zip(out.texts, out.finish_reasons, strict=True):
        if reason == "stop":
            depth = text.count("(")
            assert text == "(" * depth + "x" + ")" * depth
    assert "stop" in out.finish_reasons


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"regex": "[0-9"}, "regex"),
        ({"json_schema": "{"}, "json_schema"),
        ({"grammar": "start: foo"}, "grammar"),
        ({"regex": 3}, "regex"),
        ({"regex": "a", "grammar": "b"}, "exclude"),
        ({"regex": "a", "prefix_allowed_tokens_fn": lambda _, ids: [1]}, "exclude"),
    ],
)
def test_wrong_grammars_are_named(model: pf.Model, options: dict[str, Any], named: str) -> None:
    with pytest.raises(pf.errors.InputError, match=named):
        model.generate("the", **options)


@pytest.mark.parametrize("kind", ["bpe", "unigram", "char"])
def test_the_bytes_of_tokens_make_the_text(kind: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(CORPUS, encoding="utf-8")
    size = 300 if kind == "bpe" else 90
    tokenizer = pf.Tokenizer.train([tmp_path / "text.txt"], kind=kind, vocab_size=size)
    pieces, text = token_bytes(tokenizer), "the café sat on 12 naïve tags — Ann"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert b"".join(pieces[i] for i in ids).decode().strip() == text
    wordpiece = pf.Tokenizer.train([tmp_path / "text.txt"], kind="wordpiece", vocab_size=90)
    with pytest.raises(pf.errors.InputError, match="wordpiece"):
        token_bytes(wordpiece)


def test_the_command_takes_grammars(model: pf.Model, tmp_path: Path) -> None:
    model.save(tmp_path / "run")
    (tmp_path / "g.lark").write_text('start: "cat" | "sat"')
    (tmp_path / "s.json").write_text('{"enum": [12]}')
    for option, value, texts in (
        ("--regex", "[ab]{3}", None),
        ("--grammar", tmp_path / "g.lark", {"cat", "sat"}),
        ("--json-schema", tmp_path / "s.json", {"12"}),
    ):
        done = CliRunner().invoke(main, ["sample", str(tmp_path / "run"), "the ", option, str(value)])
        text = done.stdout.strip().removeprefix("the ")
        assert re.fullmatch("[ab]{3}", text) if texts is None else text in texts
