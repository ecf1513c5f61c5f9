"""Speculative decoding and contrastive search: laws, and naive versions beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyrformer as pf
from pyrformer.generation.strategies import Lookup


@pytest.fixture(scope="module")
def model(fixtures: Path) -> pf.Model:
    return pf.load(fixtures / "models" / "gpt2")


def like(model: pf.Model, noise: float) -> pf.Model:
    """A model with weights near those of ``model``."""
    other = pf.Model.from_config(model.config)
    rng = np.random.default_rng(0)
    state = model.state_dict()
    spread = {k: noise * w.std() * rng.standard_normal(w.shape) for k, w in state.items()}
    other.load_state_dict({k: (w + spread[k]).astype(w.dtype) for k, w in state.items()})
    return other


PROMPTS = [[5, 6, 7, 8, 5, 6], [40], [9, 9, 9, 3]]
GREEDY: dict[str, Any] = {"max_new_tokens": 30, "eos_token_id": []}


@pytest.mark.parametrize("processors", [{}, {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}])
def test_drafts_leave_greedy_search_as_it_is(model: pf.Model, processors: dict[str, Any]) -> None:
    plain = model.generate(PROMPTS, **GREEDY, **processors)
    looked = model.generate(PROMPTS, prompt_lookup_num_tokens=4, **GREEDY, **processors)
    assert looked.ids == plain.ids
    assert looked.finish_reasons == plain.finish_reasons
    for ours, theirs in zip(looked.token_logprobs, plain.token_logprobs, strict=True):
        assert np.allclose(ours, theirs, atol=1e-5)
    for noise in (0.0, 0.05, 3.0):
        helped = model.generate(PROMPTS, assistant_model=like(model, noise), **GREEDY, **processors)
        assert helped.ids == plain.ids


def test_drafts_go_on_beyond_the_positions(model: pf.Model) -> None:
    options: dict[str, Any] = {"max_new_tokens": 150, "eos_token_id": []}
    plain = model.generate(PROMPTS[:1], **options)
    for drafted in ({"prompt_lookup_num_tokens": 5}, {"assistant_model": like(model, 0.02)}):
        assert model.generate(PROMPTS[:1], **options, **drafted).ids == plain.ids


def test_drafts_end_where_plain_text_ends(model: pf.Model) -> None:
    plain = model.generate(PROMPTS[:1], **GREEDY)
    end = plain.ids[0][7]
    options: dict[str, Any] = {"max_new_tokens": 30, "eos_token_id": end}
    again = model.generate(PROMPTS[:1], assistant_model=like(model, 0.0), **options)
    assert again.ids == model.generate(PROMPTS[:1], **options).ids
    assert again.finish_reasons == ["stop"]
    stopped = model.generate(
        PROMPTS[:1], prompt_lookup_num_tokens=3, stopping_criteria=lambda ids: len(ids) == 11, **GREEDY
    )
    assert stopped.ids[0] == plain.ids[0][:5]


def test_looked_up_drafts_leave_every_sample_as_it_is(model: pf.Model) -> None:
    options: dict[str, Any] = {
        "max_new_tokens": 25,
        "do_sample": True,
        "top_k": 3,
        "seed": 4,
        "eos_token_id": [],
    }
    plain = model.generate(PROMPTS, num_return_sequences=3, **options)
    looked = model.generate(PROMPTS, num_return_sequences=3, prompt_lookup_num_tokens=4, **options)
    assert looked.ids == plain.ids


def test_an_assistants_drafts_leave_the_distribution_as_it_is(model: pf.Model) -> None:
    """Chi-square of the first two tokens against what the forward pass says."""
    prompt, draws = [5, 6, 7], 1500
    options: dict[str, Any] = {"do_sample": True, "temperature": 0.7, "top_k": 3, "eos_token_id": []}
    drawn = model.generate(
        [prompt], max_new_tokens=2, num_return_sequences=draws, assistant_model=like(model, 0.3),
        num_assistant_tokens=2, seed=1, **options,
    )  # fmt: skip

    def follows(ids: list[int]) -> np.ndarray:
        logits = np.asarray(model(np.array([ids])).logits)[0, -1]
        return pf.filter_logits(logits, temperature=0.7, top_k=3)

    counts: dict[tuple[int, ...], int] = {}
    for ids in drawn.ids:
        counts[tuple(ids)] = counts.get(tuple(ids), 0) + 1
    chi, cells, first = 0.0, 0, follows(prompt)
    for a in np.flatnonzero(first).tolist():
        second = follows([*prompt, a])
        for b in np.flatnonzero(second).tolist():
            expected = draws * float(first[a]) * float(second[b])
            chi += (counts.pop((a, b), 0) - expected) ** 2 / expected
            cells += 1
    assert not counts, "a filtered token was drawn"
    # 9 cells, 8 degrees of freedom: 26.1 is passed once in a thousand seeds.
    assert cells == 9
    assert chi < 26.1


def contrastive(model: pf.Model, prompt: list[int], k: int, alpha: float, new: int) -> list[int]:
    """Su et al. 2022, equation 5, with a whole forward pass for each candidate."""
    ids = list(prompt)
    for _ in range(new):
        logits = np.asarray(model(np.array([ids])).logits)[0, -1].astype(np.float64)
        p = np.exp(logits - logits.max())
        p /= p.sum()
        best, chosen = -np.inf, -1
        for token in np.argsort(-p, kind="stable")[:k].tolist():
            hidden = np.asarray(model(np.array([[*ids, token]])).hidden)[0].astype(np.float64)
            hidden /= np.linalg.norm(hidden, axis=-1, keepdims=True)
            score = (1 - alpha) * p[token] - alpha * (hidden[:-1] @ hidden[-1]).max()
            if score > best:
                best, chosen = score, token
        ids.append(chosen)
    return ids[len(prompt) :]


@pytest.mark.parametrize(("k", "alpha"), [(4, 0.6), (3, 0.2), (5, 1.0)])
def test_contrastive_search_by_its_definition(model: pf.Model, k: int, alpha: float) -> None:
    out = model.generate(PROMPTS, max_new_tokens=12, top_k=k, penalty_alpha=alpha, eos_token_id=[])
    assert out.ids == [contrastive(model, prompt, k, alpha, 12) for prompt in PROMPTS]
    greedy = model.generate(PROMPTS, max_new_tokens=12, eos_token_id=[])
    assert (
        model.generate(PROMPTS, max_new_tokens=12, top_k=k, penalty_alpha=0.0, eos_token_id=[]).ids
        == greedy.ids
    )
    assert out.ids != greedy.ids


def test_contrastive_sequences_end_each_for_itself(model: pf.Model) -> None:
    options: dict[str, Any] = {"max_new_tokens": 12, "top_k": 4, "penalty_alpha": 0.6}
    whole = model.generate(PROMPTS, eos_token_id=[], **options)
    end = whole.ids[1][4]
    cut = model.generate(PROMPTS, eos_token_id=end, **options)
    for got, want in zip(cut.ids, whole.ids, strict=True):
        assert got == (want[: want.index(end) + 1] if end in want else want)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"penalty_alpha": 0.5}, "top_k"),
        ({"penalty_alpha": 2, "top_k": 4}, "penalty_alpha"),
        ({"penalty_alpha": 0.5, "top_k": 4, "do_sample": True}, "penalty_alpha needs"),
        ({"penalty_alpha": 0.5, "top_k": 4, "max_new_tokens": 200}, "positions"),
        ({"prompt_lookup_num_tokens": 0}, "prompt_lookup_num_tokens"),
        ({"prompt_lookup_num_tokens": 3, "num_beams": 2}, "num_beams"),
        ({"prompt_lookup_num_tokens": 3, "output_steps": 2}, "output_steps"),
        ({"num_assistant_tokens": 3}, "assistant_model"),
        ({"ordered_constraints": True, "num_beams": 2}, "ordered_constraints"),
    ],
)
def test_contradictions_are_named(model: pf.Model, options: dict[str, Any], named: str) -> None:
    with pytest.raises(pf.errors.InputError, match=named):
        model.generate([[5]], **options)
    with pytest.raises(pf.errors.InputError, match="another model"):
        model.generate([[5]], assistant_model=model)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 3}])
def test_steps_say_what_could_have_come(model: pf.Model, options: dict[str, Any]) -> None:
    out = model.generate(PROMPTS, max_new_tokens=4, output_steps=5, eos_token_id=[], **options)
    assert [len(step.tokens) for step in out.steps] == [3, *[3 * options.get("num_beams", 1)] * 3]
    for step in out.steps:
        for candidates in step.candidates:
            chances = [c.probability for c in candidates]
            assert len(candidates) == 5
            assert chances == sorted(chances, reverse=True)
            assert sum(chances) <= 1 + 1e-6
            if "top_k" in options:
                assert [c.weight > 0 for c in candidates] == [True] * 3 + [False] * 2
                assert sum(c.weight for c in candidates) == pytest.approx(1, abs=1e-5)
    if "num_beams" not in options:
        logprobs = [step.logprobs[1] for step in out.steps[1:]]
        assert logprobs == pytest.approx(out.token_logprobs[1][:-1], abs=1e-6)


def test_constraints_in_order(model: pf.Model) -> None:
    force = [[[11, 12]], [[14], [15]]]
    for words in (force, force[::-1]):
        out = model.generate(
            [[5]], max_new_tokens=8, num_beams=6, force_words_ids=words, ordered_constraints=True
        )
        ids = out.ids[0]
        pair = next(i for i in range(8) if ids[i : i + 2] == [11, 12])
        single = [i for i in range(len(ids)) if ids[i] in (14, 15)]
        assert max(single) > pair + 1 if words is force else min(single) < pair


def test_stop_strings_end_beams(model: pf.Model, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the cat sat on the mat")
    model.save(tmp_path / "m")
    model = pf.load(tmp_path / "m")
    model.tokenizer = pf.Tokenizer.train([tmp_path / "text.txt"], kind="char", vocab_size=40)
    vocabulary = model.tokenizer.vocab_size
    options: dict[str, Any] = {
        "max_new_tokens": 20, "eos_token_id": [], "num_beams": 3, "num_return_sequences": 3,
        "prefix_allowed_tokens_fn": lambda _, ids: range(5, vocabulary),
    }  # fmt: skip
    whole = model.generate(PROMPTS[:1], **options)
    stop = whole.texts[0][3:5]
    cut = model.generate(PROMPTS[:1], stop_strings=[stop], **options)
    assert "stop" in cut.finish_reasons
    for text, reason in zip(cut.texts, cut.finish_reasons, strict=True):
        assert stop not in text[:-1]
        assert text.endswith(stop) == (reason == "stop")


def test_functions_of_the_caller_know_their_prompt(model: pf.Model) -> None:
    def allowed(prompt: int, ids: list[int]) -> list[int]:
        return [10 + prompt, 20 + prompt]

    plain = model.generate(PROMPTS, prefix_allowed_tokens_fn=allowed, **GREEDY)
    assert set(plain.ids[1]) <= {11, 21}
    drafted = model.generate(PROMPTS, prefix_allowed_tokens_fn=allowed, prompt_lookup_num_tokens=3, **GREEDY)
    assert drafted.ids == plain.ids


@pytest.mark.parametrize(
    ("ids", "most", "drafted"),
    [
        ([1, 2, 3, 4, 1, 2], 9, [3, 4, 1]),
        ([1, 2, 3, 4, 1, 2], 2, [3, 4]),
        ([1, 2, 9, 9, 9, 1, 2, 8, 8, 8, 1, 2], 9, [8, 8, 8]),  # the latest that is long enough
        ([7, 7, 7, 7, 7, 7], 9, [7, 7, 7]),
        ([5, 7, 7], 9, [7]),  # too near the end: what there is
        ([1, 2, 3, 9, 2], 9, [3, 9, 2]),  # no pair, so one token
        ([1, 2, 3], 9, []),
        ([1], 9, []),
    ],
)
def test_lookup_proposes_what_followed_before(ids: list[int], most: int, drafted: list[int]) -> None:
    proposer: Any = Lookup(3, 2)
    assert [token for token, _ in proposer.propose(None, ids, most)] == drafted


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_prompt_and_text_make_the_whole(kind: str, model: pf.Model, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the cat sat on the mat. don't, naïve café! " * 9, encoding="utf-8")
    tokenizer = pf.Tokenizer.train([tmp_path / "text.txt"], kind=kind, vocab_size=290)
    small = pf.Model.from_config({**model.config, "vocab_size": tokenizer.vocab_size, "eos_token_id": None})
    small.tokenizer = tokenizer
    prompts = ["the cat", "on the mat ."]
    for options in (
        {"do_sample": True, "num_return_sequences": 2},
        {"num_beams": 2},
        {"prompt_lookup_num_tokens": 2},
    ):
        out = small.generate(prompts, max_new_tokens=12, **options)  # type: ignore[arg-type]
        each = len(out.ids) // 2
        for i, (text, ids) in enumerate(zip(out.texts, out.ids, strict=True)):
            start = tokenizer.encode(prompts[i // each]).ids
            assert tokenizer.decode(start) + text == tokenizer.decode([*start, *ids])
    streamed = "".join(small.stream(prompts[0], max_new_tokens=12))
    assert streamed == small.generate(prompts[0], max_new_tokens=12).texts[0]
