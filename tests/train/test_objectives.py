"""Prefix language modelling and BERT's pairs: what batches hold, that models learn from them, that runs go on bit for
bit."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyrformer as pf
from pyrformer import programs
from pyrformer.batch import Batch
from pyrformer.data.batches import Batches, Masking
from pyrformer.data.pairs import Sentences, sentences
from pyrformer.errors import Error
from pyrformer.tokenizers import Tokenizer

WORDS = ["cat", "dog", "king", "crow", "wolf", "hen"]
#: Each paragraph speaks of one animal, so that its sentences tell where they belong.
PARAGRAPHS = [
    f"The {w} sat. The {w} lay on a mat by the door! Did the {w} sleep? One {w} ran\nand another {w} swam."
    for w in WORDS
]
TEXT = "\n\n".join(PARAGRAPHS * 4)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(iter([TEXT]), preset="bert-uncased", vocab_size=120)


@pytest.fixture(scope="module")
def corpus(tokenizer: Tokenizer) -> Sentences:
    return sentences(tokenizer, [TEXT])


def pairs(corpus: Sentences, tokenizer: Tokenizer, **more: Any) -> Batches:
    options: dict[str, Any] = {"seq_len": 24, "batch_size": 8, "seed": 5, **more}
    return Batches(corpus, "mlm+nsp", tokenizer=tokenizer, **options)


def unmasked(batch: Batch) -> np.ndarray:
    """The ids before some of them were masked."""
    ids, places = batch.arrays["input_ids"].copy(), batch.arrays["labels"] >= 0
    ids.reshape(-1)[batch.arrays["positions"][places]] = batch.arrays["labels"][places]
    return ids


def test_sentences(corpus: Sentences, tokenizer: Tokenizer) -> None:
    assert len(corpus.documents) == 25
    assert np.diff(corpus.documents).tolist() == [5] * 24
    ids, offsets = corpus.texts.ids, corpus.texts.offsets
    first = [tokenizer.decode(ids[a:b]) for a, b in pairwise(offsets[:6])]
    assert first[:3] == ["the cat sat.", "the cat lay on a mat by the door!", "did the cat sleep?"]
    assert len(sentences(tokenizer, ["", "\n\n \n", "a. b.\n\n\n\nc"]).documents) == 3


def test_pairs_are_what_they_say(corpus: Sentences, tokenizer: Tokenizer) -> None:
    batches = pairs(corpus, tokenizer)
    sep, cls = tokenizer.masking_ids()[1], tokenizer.masking_ids()[0]
    whole = corpus.texts.ids.tolist()
    follows, firsts = [], set()
    for step in range(60):
        batch = batches.ready(step)
        names = ("token_type_ids", "segments", "sentence_labels")
        arrays = (batch.arrays[name] for name in names)
        for ids, types, real, label in zip(unmasked(batch), *arrays, strict=True):
            n = int(real.sum())
            if n == 0:
                assert label == -100
                continue
            assert n <= 24
            assert not real[n:].any()
            a, b = np.flatnonzero(ids[:n] == sep)
            assert b == n - 1
            assert ids[0] == cls
            assert types[: a + 1].max() == 0
            assert types[a + 1 : n].min() == 1
            one, two = ids[1:a].tolist(), ids[a + 1 : b].tolist()
            assert one
            assert two
            text = " ".join(map(str, whole))
            assert " ".join(map(str, one)) in text
            assert " ".join(map(str, two)) in text
            follows.append(int(label))
            firsts.add(tuple(one))
    rate = np.mean(follows)
    assert abs(rate - 0.5) < 4 * (0.25 / len(follows)) ** 0.5
    assert len(firsts) > 12


def test_a_second_text_that_follows_stands_behind_the_first(tokenizer: Tokenizer) -> None:
    """With room for all, following pairs are whole documents and others begin outside the document."""
    distinct = [" ".join(f"{a}{b}" for b in "xyz") + ". " + f"{a} {a}. {a}." for a in "abcdefgh"]
    corpus = sentences(tokenizer, ["\n\n".join(distinct)])
    batches = pairs(corpus, tokenizer, seq_len=64)
    offsets, documents = corpus.texts.offsets, corpus.documents
    whole = [corpus.texts.ids[offsets[a] : offsets[b]].tolist() for a, b in pairwise(documents)]
    sep = tokenizer.masking_ids()[1]
    for step in range(20):
        batch = batches.ready(step)
        for ids, label in zip(unmasked(batch), batch.arrays["sentence_labels"], strict=True):
            if label < 0:
                continue
            a, b = np.flatnonzero(ids == sep)
            one, two = ids[1:a].tolist(), ids[a + 1 : b].tolist()
            assert ([*one, *two] in whole) == (label == 0)
            home = next(d for d in whole if d[: len(one)] == one)
            if label == 1:
                assert any(d != home and d[-len(two) :] == two for d in whole)


def test_a_batch_depends_on_seed_and_step_alone(corpus: Sentences, tokenizer: Tokenizer) -> None:
    one, two, other = (pairs(corpus, tokenizer, seed=s) for s in (5, 5, 6))
    for step in (9, 3, 0):
        a, b, c = (x.ready(step).arrays for x in (one, two, other))
        assert all(np.array_equal(a[k], b[k]) for k in a)
        assert not all(np.array_equal(a[k], c[k]) for k in a if a[k].shape == c[k].shape)
    held = pairs(corpus, tokenizer, shuffle=False)
    assert sum(held.ready(i).sentence_labels for i in range(held.batches_per_pass)) >= 24


@pytest.mark.parametrize("whole_word", [False, True])
def test_masks(corpus: Sentences, tokenizer: Tokenizer, whole_word: bool) -> None:
    masking = Masking(0.3, whole_word=whole_word)
    plain = pairs(corpus, tokenizer, masking=Masking(mlm_probability=1e-12))
    batches = pairs(corpus, tokenizer, masking=masking)
    special, mask = tokenizer.masking_ids()[:3], tokenizer.masking_ids()[3]
    labelled = places = masked = 0
    for step in range(40):
        before, batch = unmasked(plain.ready(step)).reshape(-1), batches.ready(step)
        ids, at, labels = (batch.arrays[k].reshape(-1) for k in ("input_ids", "positions", "labels"))
        at, labels = at[labels >= 0], labels[labels >= 0]
        assert batch.labels == len(at)
        assert np.array_equal(before[at], labels)
        untouched = np.delete(np.arange(len(ids)), at)
        assert np.array_equal(ids[untouched], before[untouched])
        assert not np.isin(labels, special).any()
        labelled, masked = labelled + len(at), masked + int((ids[at] == mask).sum())
        places += int((~np.isin(before, special)).sum())
        if whole_word:
            chosen = np.isin(np.arange(len(ids)), at)
            inner = np.flatnonzero(~tokenizer.begins_word(before))
            assert np.array_equal(chosen[inner], chosen[inner - 1])
    assert abs(labelled / places - 0.3) < 0.03
    assert abs(masked / labelled - 0.8) < 0.04


def test_pairs_refuse(tokenizer: Tokenizer) -> None:
    for text in ("only one", "one here\n\nand another", "two. sentences."):
        with pytest.raises(Error, match="paragraphs"):
            pairs(sentences(tokenizer, [text]), tokenizer)
    with pytest.raises(Error, match="seq_len"):
        pairs(sentences(tokenizer, [TEXT]), tokenizer, seq_len=4)
    # One document is enough where there is text outside the pair.
    assert (
        pairs(sentences(tokenizer, ["the cat. sat on. a mat. by the door. " * 5]), tokenizer)
        .ready(0)
        .sentence_labels
    )


def options(tmp_path: Path, out: str, objective: str, content: str = TEXT, **more: Any) -> pf.TrainConfig:
    text = tmp_path / "text.txt"
    text.write_text(content, encoding="utf-8")
    masked = {"preset": "bert-uncased", "vocab_size": 120}
    kind = {"mlm+nsp": "bert", "prefix": "llama"}[objective]
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    return pf.TrainConfig(
        **{
            "files": [str(text)],
            "valid": [str(text)],
            "out": str(tmp_path / out),
            "objective": objective,
            "model": {"model_type": kind, **sizes} | ({"hidden_dropout_prob": 0.1} if kind == "bert" else {}),
            "tokenizer": masked if kind == "bert" else {"kind": "char"},
            "seq_len": 32,
            "batch_size": 8,
            "max_steps": 12,
            "learning_rate": 3e-3,
            "lr_scheduler_type": "constant_with_warmup",
            "warmup_steps": 2,
            "log_every": 1,
            "eval_every": 0,
            "save_every": 5,
            "seed": 3,
            **more,
        }
    )


@pytest.mark.parametrize("objective", ["mlm+nsp", "prefix"])
def test_a_run_goes_on_bit_for_bit(tmp_path: Path, objective: str) -> None:
    straight = pf.train(options(tmp_path, "a", objective, gradient_accumulation_steps=2))
    pf.train(options(tmp_path, "b", objective, gradient_accumulation_steps=2, max_steps=5))
    more = pf.train(options(tmp_path, "b", objective, gradient_accumulation_steps=2, resume=True))
    assert more.valid_loss == straight.valid_loss
    for name, value in straight.model.state_dict().items():
        assert np.array_equal(more.model.state_dict()[name], value), name


def test_pairs_are_learned(tmp_path: Path) -> None:
    # A second text that begins like a first one is random; the best loss possible is 0.75·H(1/3) = 0.48 nats.
    text = "\n\n".join(f"then a {w} began.\nso the {w} ended" for w in WORDS * 20)
    run = pf.train(options(tmp_path, "run", "mlm+nsp", text, max_steps=120))
    assert run.model.config["architectures"] == ["BertForPreTraining"]
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["valid_sentence_loss"] < 0.64
    opened = pf.load(run.folder)
    assert opened([[2, 7, 3]]).seq_relationship_logits.shape == (1, 2)
    # A model for masked tokens gets the head for pairs.
    small = pf.train(options(tmp_path, "first", "mlm+nsp", max_steps=1))
    config = {**small.model.config, "architectures": ["BertForMaskedLM"]}
    masked = pf.Model.from_config(config, tokenizer=small.model.tokenizer)
    masked.save(tmp_path / "masked")
    again = options(
        tmp_path, "more", "mlm+nsp", init_from=str(tmp_path / "masked"), model={}, tokenizer={}, max_steps=1
    )
    assert pf.train(again).model.config["architectures"] == ["BertForPreTraining"]


@pytest.mark.parametrize("kind", ["gpt2", "llama", "falcon", "opt", "gpt_neox"])
def test_what_a_prefix_shows(kind: str) -> None:
    """Tokens of the prefix see all of it; what is predicted is seen by nobody before."""
    small: dict[str, Any] = {"model_type": kind, "vocab_size": 30}
    family = pf.models.FAMILIES[kind][0]
    small |= {
        family.SIZES["layers"]: 1,
        family.SIZES["width"]: 16,
        family.SIZES["heads"]: 2,
        "initializer_range": 0.5,
    }
    model = pf.Model.from_config(small, seed=1, dtype="float64")
    sizes = replace(model.batch([[1] * 8]).sizes, prefix=True)

    def hidden(ids: list[int]) -> np.ndarray:
        arrays = {**model.batch([ids]).arrays, "prefix": np.array([4], np.int32)}
        program = model.program(("p", sizes), lambda: programs.encode(model.family, sizes, model.dtype))
        return program(**arrays)["hidden"][0]

    one = hidden([3, 4, 5, 6, 7, 8, 9, 10])
    for place in range(8):
        ids = [3, 4, 5, 6, 7, 8, 9, 10]
        ids[place] = 20
        changed = np.abs(hidden(ids) - one).max(-1) > 1e-9
        wanted = [True] * 8 if place < 4 else [i >= place for i in range(8)]
        assert changed.tolist() == wanted, place


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(Error, match="learns 'mlm'"):
        pf.train(options(tmp_path, "x", "prefix", model={"model_type": "bert"}))
    with pytest.raises(Error, match="ForPreTraining"):
        pf.train(options(tmp_path, "x", "mlm+nsp", model={"model_type": "roberta"}))
    assert not (tmp_path / "x").exists()
