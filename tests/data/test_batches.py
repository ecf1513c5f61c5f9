"""Batches for any loop: ranks, seeking, masked spans and words."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import pyrformer as pf
from pyrformer.data.batches import OBJECTIVES, Masking
from pyrformer.data.documents import tokenize
from pyrformer.data.pairs import sentences

TEXTS = [f"chapter {i}: the quick brown foxes jump over {i} unbelievably lazy dogs" for i in range(60)]


@pytest.fixture(scope="module")
def tokenizer() -> pf.Tokenizer:
    return pf.Tokenizer.train(iter(TEXTS), preset="bert-uncased", vocab_size=90)


def batches(tokenizer: pf.Tokenizer, objective: str = "mlm", **options: object) -> pf.Batches:
    paragraphs = ["\n\n".join(f"{text}. it ran. {text}" for text in TEXTS)]
    corpus = (
        sentences(tokenizer, paragraphs)
        if objective == "mlm+nsp"
        else tokenize(tokenizer, TEXTS, objective=objective)
    )
    given = {"seq_len": 24, "batch_size": 4, "tokenizer": tokenizer, "seed": 3, **options}
    return pf.Batches(corpus, objective, **given)  # type: ignore[arg-type]


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("world_size", [2, 7])
def test_ranks_share_the_batches_of_one(tokenizer: pf.Tokenizer, objective: str, world_size: int) -> None:
    for shuffle in (True, False):
        one = batches(tokenizer, objective, shuffle=shuffle)
        ranks = [
            batches(tokenizer, objective, shuffle=shuffle, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        assert sum(rank.batches_per_pass for rank in ranks) == one.batches_per_pass
        if shuffle:
            for step in (0, 1, 50, 10**12):
                for r, rank in enumerate(ranks):
                    assert same(rank.batch(step), one.batch(step * world_size + r))
                    assert rank.documents(step) == one.documents(step * world_size + r)
        else:
            together = [b for row in itertools.zip_longest(*ranks) for b in row if b is not None]
            assert len(together) == one.batches_per_pass
            assert all(map(same, together, one))


def test_iteration_goes_on_from_any_step(tokenizer: pf.Tokenizer) -> None:
    endless = batches(tokenizer)
    straight = list(itertools.islice(endless, 12))
    assert all(map(same, straight[7:], endless.iterate(7)))
    once = batches(tokenizer, shuffle=False)
    assert len(list(once.iterate(5))) == once.batches_per_pass - 5


@pytest.mark.parametrize(("rank", "world_size"), [(-1, 2), (2, 2), (0, 0)])
def test_ranks_out_of_range(tokenizer: pf.Tokenizer, rank: int, world_size: int) -> None:
    with pytest.raises(pf.errors.InputError, match="rank must be"):
        batches(tokenizer, rank=rank, world_size=world_size)


def test_spans_are_longer_than_single_draws(tokenizer: pf.Tokenizer) -> None:
    def share_and_mean(masking: Masking) -> tuple[float, float]:
        chosen = tokens = runs = 0
        for batch in itertools.islice(batches(tokenizer, batch_size=16, masking=masking), 200):
            label = batch["labels"] != -100
            chosen += int(label.sum())
            runs += int((label & ~np.roll(label, 1, axis=1)).sum())
            tokens += int(batch["attention_mask"].sum()) - 2 * len(label)
        return chosen / tokens, chosen / runs

    share, mean = share_and_mean(Masking())
    assert abs(share - 0.15) < 0.01
    assert mean < 1.4
    share, mean = share_and_mean(Masking(span_p=0.2))
    assert abs(share - 0.15) < 0.02
    assert mean > 2.5


@pytest.mark.parametrize(
    "masking", [Masking(span_p=-1), Masking(span_p=2), Masking(span_p=0.5, span_max_length=0)]
)
def test_spans_out_of_range(tokenizer: pf.Tokenizer, masking: Masking) -> None:
    with pytest.raises(pf.errors.DataError, match="span_"):
        batches(tokenizer, masking=masking)


@pytest.mark.parametrize("options", [{"kind": "bpe"}, {"preset": "llama"}, {"kind": "unigram"}])
def test_words_of_any_tokenizer_begin_at_spaces(options: dict[str, str]) -> None:
    texts = [*TEXTS, "naïve Ångström élève à Ēma", "chapter,dogs(60)"] * 2
    tokenizer = pf.Tokenizer.train(iter(texts), vocab_size=350, **options)
    for text in ("jump over à lazy élève", "the unbelievably quick chapter"):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        begins = tokenizer.begins_word(ids)
        assert begins.sum() == text.count(" ") + 1, tokenizer.encode(text).tokens
    # Byte-level tokenizers cut at punctuation and digits, as their pre-tokenizer does.
    ids = tokenizer.encode("chapter,dogs(60)", add_special_tokens=False).ids
    assert tokenizer.begins_word(ids).sum() == (6 if options == {"kind": "bpe"} else 1)


def test_permutations_are_those_of_the_model(tokenizer: pf.Tokenizer) -> None:
    """The arrays under Hugging Face's names say what the programs are given."""
    made = batches(tokenizer, "plm", plm_probability=0.3, max_span_length=3)
    batch, ready = made.batch(5), made.ready(5)
    b, t = batch["input_ids"].shape
    p = batch["labels"].shape[1]
    assert batch["perm_mask"].shape == (b, t, t)
    assert batch["target_mapping"].shape == (b, p, t)
    assert batch["perm_mask"].dtype == batch["target_mapping"].dtype == np.float32
    small = {"n_layer": 1, "d_model": 16, "n_head": 2, "d_inner": 32, "vocab_size": tokenizer.vocab_size}
    model = pf.Model.from_config({"model_type": "xlnet", **small}, dtype="float64")
    given = model.batch(**batch)
    for name in ("input_ids", "hidden", "targets", "token_type_ids"):
        assert np.array_equal(given.arrays[name], ready.arrays[name]), name
    places = batch["labels"] != -100
    assert ready.labels == places.sum() > 0
    assert np.array_equal(batch["target_mapping"].sum(-1), places)
    predicted = (batch["target_mapping"] @ batch["input_ids"][:, :, None])[..., 0]
    assert np.array_equal(predicted[places], batch["labels"][places])


def test_an_objective_has_its_corpus(tokenizer: pf.Tokenizer) -> None:
    corpus = tokenize(tokenizer, TEXTS, objective="mlm")
    for given, objective in ((corpus, "mlm+nsp"), (sentences(tokenizer, TEXTS), "mlm"), (corpus, "sop")):
        with pytest.raises(pf.errors.InputError, match="objective"):
            pf.Batches(given, objective, seq_len=8, batch_size=2, tokenizer=tokenizer)
