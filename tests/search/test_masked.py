"""Mask-predict and Gibbs sampling: their laws, and naive versions beside them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import pyrformer as pf
from pyrformer.cli import main

MASK = 4


@pytest.fixture(scope="module")
def model(fixtures: Path) -> pf.Model:
    return pf.load(fixtures / "models" / "bert_mlm")


def logprobs(model: pf.Model, ids: list[int], at: int) -> np.ndarray:
    """What the model says of a place, its mask token left out."""
    logits = np.asarray(model(np.array([ids])).logits)[0, at].astype(np.float64)
    logits[MASK] = -np.inf
    logits -= logits.max()
    return np.asarray(logits - np.log(np.exp(logits).sum()))


TEXT = [2, 17, MASK, 9, MASK, MASK, 30, MASK, 3]


@pytest.mark.parametrize("iterations", [1, 2, 3, 10])
def test_mask_predict_by_its_definition(model: pf.Model, iterations: int) -> None:
    ids, places = list(TEXT), [i for i, t in enumerate(TEXT) if t == MASK]
    sure = dict.fromkeys(places, 0.0)
    open_ = places
    for done in range(1, iterations + 1):
        for at in open_:
            ids[at] = MASK
        found = {at: logprobs(model, ids, at) for at in open_}
        for at in open_:
            ids[at] = int(found[at].argmax())
            sure[at] = float(found[at].max())
        open_ = sorted(places, key=lambda at: sure[at])[: len(places) * (iterations - done) // iterations]
    out = model.mask_predict([TEXT], iterations=iterations, mask_token_id=MASK)
    assert out.ids == [ids]
    assert out.token_logprobs[0] == pytest.approx([sure[at] for at in places], abs=1e-5)


def test_gibbs_draws_from_the_conditionals(model: pf.Model) -> None:
    """After one visit to each of two places, in either order, the law of the pair is known: a chi-square test."""
    text, draws, filters = [2, 17, MASK, 9, MASK, 3], 4000, {"top_k": 3, "temperature": 0.9}

    def law(ids: list[int], at: int) -> np.ndarray:
        return pf.filter_logits(logprobs(model, ids, at), **filters)

    expected: dict[tuple[int, int], float] = {}
    for first, second in ((2, 4), (4, 2)):
        p = law(text, first)
        for a in np.flatnonzero(p).tolist():
            ids = list(text)
            ids[first] = a
            q = law(ids, second)
            for b in np.flatnonzero(q).tolist():
                pair = (a, b) if first == 2 else (b, a)
                expected[pair] = expected.get(pair, 0.0) + 0.5 * draws * float(p[a]) * float(q[b])
    out = model.gibbs([text], iterations=1, num_return_sequences=draws, seed=2, mask_token_id=MASK, **filters)
    counts = dict.fromkeys(expected, 0)
    for ids in out.ids:
        counts[ids[2], ids[4]] += 1  # a pair of no probability is a KeyError
    chi = sum((counts[pair] - e) ** 2 / e for pair, e in expected.items())
    freedom = len(expected) - 1
    # Wilson and Hilferty's bound that is passed once in a thousand seeds.
    assert chi < freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3


def test_samples_depend_on_seed_and_number_alone(model: pf.Model) -> None:
    many = model.gibbs([TEXT], num_return_sequences=5, iterations=3, seed=7, mask_token_id=MASK)
    few = model.gibbs([TEXT], num_return_sequences=2, iterations=3, seed=7, mask_token_id=MASK)
    other = model.gibbs([TEXT], num_return_sequences=5, iterations=3, seed=8, mask_token_id=MASK)
    assert few.ids == many.ids[:2]
    assert many.ids != other.ids
    for ids, values in zip(many.ids, many.token_logprobs, strict=True):
        assert [t for t, was in zip(ids, TEXT, strict=True) if was != MASK] == [t for t in TEXT if t != MASK]
        assert MASK not in ids
        assert len(values) == 4
        assert max(values) <= 0


def test_a_text_without_masks_stays(model: pf.Model) -> None:
    for out in (
        model.mask_predict([[2, 9, 3]], mask_token_id=MASK),
        model.gibbs([[2, 9, 3]], mask_token_id=MASK),
    ):
        assert (out.ids, out.token_logprobs) == ([[2, 9, 3]], [[]])


def test_wrong_uses_are_named(model: pf.Model, fixtures: Path) -> None:
    for call in (model.mask_predict, model.gibbs):
        with pytest.raises(pf.errors.InputError, match="iterations"):
            call([TEXT], iterations=0, mask_token_id=MASK)
        with pytest.raises(pf.errors.InputError, match="mask token"):
            call([TEXT])
        with pytest.raises(pf.errors.InputError, match="tokens"):
            call([[MASK] * 1000], mask_token_id=MASK)
    with pytest.raises(pf.errors.InputError, match="top_p"):
        model.gibbs([TEXT], top_p=2.0, mask_token_id=MASK)
    with pytest.raises(pf.errors.InputError, match="num_return_sequences"):
        model.gibbs([TEXT], num_return_sequences=0, mask_token_id=MASK)
    with pytest.raises(pf.errors.InputError, match="not trained on masked"):
        pf.load(fixtures / "models" / "gpt2").gibbs([TEXT], mask_token_id=MASK)


def test_the_command_fills_masks(model: pf.Model, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the cat sat on the mat and the dog lay by the door " * 5)
    tokenizer = pf.Tokenizer.train(
        [tmp_path / "text.txt"], kind="wordpiece", preset="bert-uncased", vocab_size=60
    )
    run = pf.Model.from_config({**model.config, "vocab_size": tokenizer.vocab_size}, seed=1)
    run.tokenizer = tokenizer
    run.save(tmp_path / "run")
    prompt = "the [MASK] sat on [MASK] [MASK]"

    def sample(*args: object, code: int = 0) -> str:
        done = CliRunner().invoke(main, ["sample", str(tmp_path / "run"), prompt, *map(str, args)])
        assert done.exit_code == code, done.output
        return done.output

    assert sample("--greedy", "--iterations", 4).strip() == run.mask_predict(prompt, iterations=4).texts[0]
    drawn = [json.loads(line) for line in sample("-n", 3, "--seed", 5, "--top-k", 9, "--json").splitlines()]
    want = run.gibbs(prompt, num_return_sequences=3, seed=5, top_k=9)
    assert [row["ids"] for row in drawn] == want.ids
    assert [row["text"] for row in drawn] == want.texts
    for ids in want.ids:
        specials = [i for i in ids if tokenizer.is_special(i)]
        assert len(specials) == 2
    assert "--num-beams" in sample("--num-beams", 3, code=2)
    assert "--seed" in sample("--greedy", "--seed", 3, code=2)
