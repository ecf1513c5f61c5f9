"""The page of `explain`: what it shows are the model's own figures, and no text breaks out of it."""

from __future__ import annotations

import base64
import json
import math
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import pyrformer as pf
from pyrformer.cli import main
from pyrformer.errors import InputError
from pyrformer.model import Model

TEXT = "The quick brown fox jumps over the lazy dog."
CORPUS = [
    TEXT,
    "the dog and the fox ran over the brown hill",
    "lazy dogs jump, quick foxes jump over them",
] * 20
GPT = {"model_type": "gpt2", "n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 72}
LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 48,
    "initializer_range": 0.5,
}
BERT = {
    "model_type": "bert",
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "max_position_embeddings": 48,
    "initializer_range": 0.5,
}
XLNET = {"model_type": "xlnet", "n_layer": 2, "d_model": 16, "n_head": 2, "d_inner": 32}


class Page(HTMLParser):
    """Elements, attributes, the JSON and the visible text of a page; complains of tags that do not close."""

    VOID = ("meta", "br")

    def __init__(self, page: str):
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.data: dict[str, Any] = {}
        self.sections: dict[str, list[str]] = {}
        self._section: list[str] = []
        self.feed(page)
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "section":
            self._section = self.sections.setdefault(str(dict(attrs)["id"]), [])
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.stack and self.stack[-1] == "script":
            if self.tags[-1][1].get("type") == "application/json":
                self.data = json.loads(data)
        elif self.stack and self.stack[-1] != "style":
            self.text.append(data)
            self._section.append(data)


def make(config: dict[str, Any], preset: str = "bert-uncased") -> Model:
    tokenizer = pf.Tokenizer.train(iter(CORPUS), preset=preset, vocab_size=320)
    ends = {"bos_token_id": None, "eos_token_id": None}
    if config["model_type"] == "gpt2":
        ends["eos_token_id"] = tokenizer.eos_token_id
    # More rows than tokens, as many published models have.
    return Model.from_config(
        {**config, **ends, "vocab_size": len(tokenizer) + 3}, seed=3, tokenizer=tokenizer
    )


def unpacked(part: dict[str, Any]) -> np.ndarray:
    values = np.frombuffer(base64.b64decode(part["values"]), np.int8).astype(np.float64) * part["scale"]
    return values.reshape(part["count"], -1, part["columns"])


@pytest.fixture(scope="module")
def gpt() -> Model:
    return make(GPT, "gpt2")


@pytest.fixture(scope="module")
def bert() -> Model:
    return make(BERT)


def row_of(model: Model, text: str) -> list[int]:
    """The ids that the page is about, by the documented rule."""
    assert model.tokenizer is not None
    plain = model.family.objective in ("ar", "plm")
    ids = model.tokenizer.encode(text, add_special_tokens=not plain).ids
    start = model.config.get("bos_token_id") or model.config.get("eos_token_id")
    return ([start] if plain and start is not None else []) + ids


@pytest.mark.parametrize(
    ("config", "preset"), [(GPT, "gpt2"), (LLAMA, "bert-uncased"), (BERT, "bert-uncased")]
)
def test_figures_are_those_of_the_model(config: dict[str, Any], preset: str) -> None:
    model = make(config, preset)
    data = Page(model.explain(TEXT)).data
    ids = row_of(model, TEXT)
    n = len(ids)
    assert len(data["tokens"]) == n

    expected = model.attention(ids)
    assert len(data["layers"]) == len(expected)
    for layer, weights in zip(data["layers"], expected, strict=True):
        shown = np.frombuffer(base64.b64decode(layer["weights"]), "<u2").reshape(weights.shape) / 65535
        np.testing.assert_allclose(shown, weights, atol=1e-5)
        np.testing.assert_allclose(shown.sum(-1), 1, atol=1e-3)
        assert layer["causal"] == (model.family.objective == "ar")
        if layer["causal"]:
            assert (np.triu(shown, 1) == 0).all()

    out = model([ids], output_hidden_states=True)
    norms = [np.linalg.norm(s[0], axis=-1) for s in out.hidden_states or []]
    np.testing.assert_allclose(data["norms"], norms, rtol=1e-4)

    scores = model.score([TEXT])
    shown_losses = [nats for _, nats in data["losses"]]
    np.testing.assert_allclose(shown_losses, -scores.token_logprobs[0], rtol=1e-5, atol=1e-5)
    by_place = dict(data["losses"])
    for p in data["predictions"]:
        if p["actual"]:
            assert math.isclose(p["p"], math.exp(-by_place[p["place"]]), rel_tol=2e-3)
        assert [q for _, q in p["top"]] == sorted((q for _, q in p["top"]), reverse=True)


def test_next_tokens_are_the_best_logits(gpt: Model) -> None:
    data = Page(gpt.explain(TEXT)).data
    ids = row_of(gpt, TEXT)
    logits = np.asarray(gpt([ids]).logits)[0].astype(np.float64)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    assert [x["place"] for x in data["predictions"]] == list(range(1, len(ids) + 1))
    for row, shown in zip(p, data["predictions"], strict=True):
        np.testing.assert_allclose([q for _, q in shown["top"]], np.sort(row)[::-1][:10], rtol=1e-4)
    assert data["predictions"][-1]["actual"] == ""


def test_guesses_of_a_masked_model_are_those_of_fill_mask(bert: Model) -> None:
    text = "the quick [MASK] fox jumps"
    data = Page(bert.explain(text)).data
    best = bert.fill_mask(text, top_k=10)[0]
    place = data["tokens"].index("[MASK]")
    (shown,) = [p for p in data["predictions"] if p["place"] == place]
    np.testing.assert_allclose([q for _, q in shown["top"]], [p.score for p in best], rtol=1e-4)
    assert shown["actual"] == ""
    assert place not in dict(data["losses"])


def test_embeddings_are_rows_of_the_tables(gpt: Model) -> None:
    strips = Page(gpt.explain(TEXT)).data["strips"]
    ids, weights = row_of(gpt, TEXT), gpt.state_dict()
    words = weights["transformer.wte.weight"][ids]
    places = weights["transformer.wpe.weight"][: len(ids)]
    for name, rows in (("words", words), ("positions", places), ("sum", words + places)):
        np.testing.assert_allclose(unpacked(strips[name])[0], rows, atol=strips[name]["scale"] * 0.51)
        np.testing.assert_allclose(strips[name]["norms"], np.linalg.norm(rows, axis=-1), rtol=1e-4)


def test_changes_of_the_text_are_marked(bert: Model) -> None:
    page = Page(bert.explain("The Fox"))
    told = "".join(page.sections["text"])
    assert "lower-case" in told
    assert "TheTthe" in told.replace(" ", "") or "Thethe" in told.replace(" ", "")
    assert [tag for tag, _ in page.tags].count("del") >= 3  # two words, and the legend


def test_nothing_of_the_text_becomes_markup(gpt: Model) -> None:
    text = "</script><script>alert(1)</script><img src=x onerror=1> & \"'<!--"
    page = Page(gpt.explain(text))
    clean = Page(gpt.explain("fox"))
    names = {tag for tag, _ in page.tags}
    assert "img" not in names
    assert names <= {tag for tag, _ in clean.tags} | {"del", "ins"}
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert text in "".join(page.sections["text"])


def test_the_page_asks_for_nothing(gpt: Model) -> None:
    page = gpt.explain(TEXT)
    for tag, attributes in Page(page).tags:
        assert tag not in ("link", "iframe", "img", "object")
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#")
    assert "@import" not in page
    assert "fetch(" not in page


def test_a_permutation_model_is_shown_from_left_to_right() -> None:
    model = make(XLNET, "xlnet")
    data = Page(model.explain(TEXT)).data
    n = len(data["tokens"])
    expected = model.attention(row_of(model, TEXT), perm_mask=np.triu(np.ones((1, n, n))))
    for layer, weights in zip(data["layers"], expected, strict=True):
        assert layer["causal"]
        shown = np.frombuffer(base64.b64decode(layer["weights"]), "<u2").reshape(weights.shape) / 65535
        np.testing.assert_allclose(shown, weights, atol=1e-5)
    np.testing.assert_allclose(
        [nats for _, nats in data["losses"]], -model.score([TEXT]).token_logprobs[0], rtol=1e-5
    )
    for p, (place, nats) in zip(data["predictions"], data["losses"], strict=True):
        assert p["place"] == place
        assert math.isclose(p["p"], math.exp(-nats), rel_tol=2e-3)


def test_models_without_a_token_head_end_with_their_vector_or_classes() -> None:
    plain = Page(make({**BERT, "architectures": ["BertModel"]}).explain(TEXT))
    assert "loss" not in plain.sections
    assert "no logits" in "".join(plain.sections["vector"])
    named = {"id2label": {"0": "<b>good", "1": "bad"}, "num_labels": 2}
    whole = make({**BERT, "architectures": ["BertForSequenceClassification"], **named})
    told = "".join(Page(whole.explain(TEXT)).sections["classes"])
    assert "<b>good" in told
    assert f"{whole.classify([TEXT]).scores[0].max():.1%}" in told
    each = make({**BERT, "architectures": ["BertForTokenClassification"], **named})
    assert len(Page(each.explain(TEXT)).data["predictions"]) == len(row_of(each, TEXT))


FAMILIES = {
    "rotary": ("falcon_7b_style", "gpt_neox", "llama3_rope", "mistral_window", "modernbert_mlm", "qwen3"),
    "ALiBi": ("falcon_rw_style",),
    "second table": ("bert_pretraining", "distilbert_mlm", "opt", "roberta_mlm"),
    "distances": ("xlnet",),
}


@pytest.mark.parametrize(("how", "name"), [(how, name) for how, names in FAMILIES.items() for name in names])
def test_every_family_has_a_page_that_says_how_places_enter(fixtures: Path, how: str, name: str) -> None:
    model = pf.load(fixtures / "models" / name)
    model.tokenizer = make(BERT).tokenizer
    page = Page(model.explain("the quick fox jumps"))
    assert how in "".join(page.sections["embedding"])
    assert len(page.data["layers"]) == len(page.data["norms"]) - 1
    assert len(page.data["losses"]) >= 4


def test_refusals(gpt: Model, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the page shows 5 at most"):
        gpt.explain(TEXT, max_tokens=5)
    with pytest.raises(InputError, match="the model has positions for 72"):
        gpt.explain(TEXT * 9, max_tokens=100)
    with pytest.raises(InputError, match="no tokens"):
        gpt.explain("")
    with pytest.raises(InputError, match="character 4 of the text is half a surrogate pair"):
        gpt.explain("fox \udcff")
    with pytest.raises(InputError, match="half a surrogate pair"):
        gpt.require_tokenizer().encode_batch(["fox \udcff"])
    with pytest.raises(InputError, match=r"1\.\.256"):
        gpt.explain(TEXT, max_tokens=0)
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        Model(gpt.family, store=gpt.store).explain(TEXT)


def test_command(gpt: Model, tmp_path: Path) -> None:
    gpt.save(tmp_path / "run")
    out = tmp_path / "fox.html"
    done = CliRunner().invoke(main, ["explain", str(tmp_path / "run"), TEXT, "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert Page(out.read_text("utf-8")).data == Page(gpt.explain(TEXT)).data
    piped = CliRunner().invoke(main, ["explain", str(tmp_path / "run"), TEXT, "--out", "-"])
    assert piped.output == out.read_text("utf-8")
    bad = CliRunner().invoke(
        main, ["explain", str(tmp_path / "run"), TEXT, "--out", str(tmp_path / "no" / "x")]
    )
    assert bad.exit_code == 2
    assert "cannot write" in bad.output


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on the path")
@pytest.mark.parametrize("config", [GPT, BERT])
def test_a_browser_draws_it(config: dict[str, Any], tmp_path: Path) -> None:
    model = make(config)
    (tmp_path / "page.html").write_text(model.explain(TEXT), "utf-8")
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    drawn = subprocess.run(
        [
            str(BROWSER),
            *flags,
            "--virtual-time-budget=3000",
            "--dump-dom",
            f"file://{tmp_path / 'page.html'}",
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    n = len(row_of(model, TEXT))
    cells = [a.get("class") for tag, a in Page(drawn).tags if tag == "rect"]
    hidden = n * (n - 1) // 2 if model.family.objective == "ar" else 0
    assert cells.count("hidden") == hidden
    assert cells.count("cell") == n * n - hidden
    assert "its row sums to 1.000" in drawn
    assert drawn.count('class="bar') == 10
