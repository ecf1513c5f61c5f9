"""What notebooks show of objects: their figures, bounded, with nothing unescaped."""

from __future__ import annotations

from html.parser import HTMLParser

import numpy as np
import pytest

import pyrformer as pf
from pyrformer.generation.generate import Generation
from pyrformer.model import Model
from pyrformer.programs import Sizes, forward

CORPUS = ["the <b>cat</b> & the dog sat on the mat"] * 30


class Cells(HTMLParser):
    """The rows of all tables, and every tag; complains of tags that do not close."""

    def __init__(self, text: str):
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: list[str] = []
        self.stack: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.stack.append(tag)
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if "td" in self.stack or "th" in self.stack:
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def model() -> Model:
    tok = pf.Tokenizer.train(iter(CORPUS), preset="bert-uncased", vocab_size=60)
    config = {"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 2, "n_positions": 32}
    return Model.from_config({**config, "vocab_size": len(tok)}, tokenizer=tok)


def test_tokenizer_and_encoding(model: Model) -> None:
    tok = model.require_tokenizer()
    shown = Cells(tok._repr_html_())
    assert f"wordpiece, {tok.vocab_size} tokens" in shown.text
    assert ["[MASK]", str(tok.mask_token_id)] in shown.rows
    text = Cells(tok.encode("the <b> cat")._repr_html_())
    assert "<" in text.text
    assert text.tags.count("span") == len(tok.encode("the <b> cat"))


def test_generation_is_a_table_of_bounded_length() -> None:
    texts = ["<script>alert(1)</script>", "x" * 5000, *["y"] * 48]
    n = len(texts)
    shown = Cells(
        Generation(texts, [[1, 2]] * n, [None] * n, [[-1.0, -2.0]] * n, ["length"] * n)._repr_html_()
    )
    assert "script" not in shown.tags
    assert shown.rows[0] == ["text", "tokens", "mean log p", "ended by"]
    assert shown.rows[1] == [texts[0], "2", "-1.5", "length"]
    assert len(shown.rows[2][0]) < 400
    assert shown.rows[-1] == ["… 30 more"]
    beams = Generation(["a"], [[1]], [-0.25], [[]], ["stop"])._repr_html_()
    assert Cells(beams).rows[1] == ["a", "1", "–", "-0.25", "stop"]


def test_batch_and_model(model: Model) -> None:
    batch = model.batch(np.arange(40).reshape(2, 20) % 30, labels=np.arange(40).reshape(2, 20) % 30)
    shown = Cells(batch._repr_html_())
    assert "2 × 20 tokens, 38 labels" in shown.text
    assert ["input_ids", "int32[2, 20]", "0 … 29"] in shown.rows
    assert shown.rows[-1][:3] == ["20", "21", "22"]
    facts = dict(row for row in Cells(model._repr_html_()).rows if len(row) == 2)
    assert facts["family"] == "gpt2"
    assert facts["parameters"] == f"{model.parameter_count:,}"


def test_plan(model: Model) -> None:
    lowered = forward(model.family, Sizes(1, 4)).lower()
    shown = Cells(lowered._repr_html_())
    assert f"forward: {len(lowered.plan)} steps" in shown.text
    assert shown.rows[1][1] == lowered.plan.table()[0][1]
    compiled = lowered.compile(model.store)
    assert compiled._repr_html_() == lowered._repr_html_()
