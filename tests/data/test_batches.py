"""Batches for any loop: ranks, seeking, masked spans and words."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import pyrformer as pf
from pyrformer.data import Masking, tokenize

TEXTS = [f"chapter {i}: the quick brown foxes jump over {i} unbelievably lazy dogs" for i in range(60)]


@pytest.fixture(scope="module")
def tokenizer() -> pf.Tokenizer:
    return pf.Tokenizer.train(iter(TEXTS), preset="bert-uncased", vocab_size=90)


def batches(tokenizer: pf.Tokenizer, objective: str = "mlm", **options: object) -> pf.Batches:
    corpus = tokenize(tokenizer, TEXTS, objective=objective)
    given = {"seq_len": 24, "batch_size": 4, "tokenizer": tokenizer, "seed": 3, **options}
    return pf.Batches(corpus, objective, **given)  # type: ignore[arg-type]


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("objective", ["ar", "mlm"])
@pytest.mark.parametrize("world_size", [2, 3, 7])
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
    texts = [*TEXTS, "naïve Ångström élève à Ēma"] * 2
    tokenizer = pf.Tokenizer.train(iter(texts), vocab_size=350, **options)
    continues = tokenizer.continues_word()
    for text in ("jump over à lazy élève", "the unbelievably quick chapter"):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        begins = sum(not continues[i] for i in ids[1:])
        assert begins == text.count(" "), tokenizer.encode(text).tokens
