"""Strategies, stopping, functions of the caller and stored options, through Python."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyrformer as pf


@pytest.fixture(scope="module")
def model(fixtures: Path) -> pf.Model:
    return pf.load(fixtures / "models" / "gpt2")


PROMPT = [[5, 6, 7]]


@pytest.mark.parametrize("force", [[[11, 12]], [[[11, 12], [13]], [14]]])
def test_constraints_are_met(model: pf.Model, force: list[Any]) -> None:
    out = model.generate(PROMPT, max_new_tokens=8, num_beams=4, force_words_ids=force)
    text = " ".join(map(str, out.ids[0]))
    for constraint in force:
        phrases = constraint if isinstance(constraint[0], list) else [constraint]
        assert any(" ".join(map(str, phrase)) in text for phrase in phrases)


def test_groups_begin_differently(model: pf.Model) -> None:
    options = {"max_new_tokens": 6, "num_beams": 4, "num_return_sequences": 4, "num_beam_groups": 4}
    out = model.generate(PROMPT, diversity_penalty=1e4, **options)
    assert len({ids[0] for ids in out.ids}) == 4


def test_stochastic_beams_are_distinct(model: pf.Model) -> None:
    options = {"do_sample": True, "num_beams": 6, "stochastic_beams": True, "num_return_sequences": 6}
    out = model.generate(PROMPT, max_new_tokens=5, **options)
    assert len({tuple(ids) for ids in out.ids}) == 6
    for score, logprobs in zip(out.scores, out.token_logprobs, strict=True):
        assert score == pytest.approx(sum(logprobs), abs=1e-4)


def test_one_sample_of_eight_can_be_redrawn(model: pf.Model) -> None:
    options = {"do_sample": True, "seed": 5, "max_new_tokens": 10}
    all_eight = model.generate(PROMPT, num_return_sequences=8, **options)
    again = model.generate(PROMPT, first_sequence=3, **options)
    assert again.ids[0] == all_eight.ids[3] != all_eight.ids[0]


def test_functions_of_the_caller(model: pf.Model) -> None:
    out = model.generate(PROMPT, max_new_tokens=6, prefix_allowed_tokens_fn=lambda _, ids: [ids[-1] + 1])
    assert out.ids == [[8, 9, 10, 11, 12, 13]]

    def processor(ids: list[int], scores: np.ndarray) -> np.ndarray:
        return np.where(np.arange(len(scores)) == len(ids), 0.0, -np.inf)

    assert model.generate(PROMPT, max_new_tokens=3, logits_processor=processor).ids == [[3, 4, 5]]
    out = model.generate(
        PROMPT, max_new_tokens=9, stopping_criteria=lambda ids: len(ids) == 7, eos_token_id=[]
    )
    assert (len(out.ids[0]), out.finish_reasons) == (4, ["stop"])
    with pytest.raises(pf.errors.InputError, match="logits_processor: returned"):
        model.generate(PROMPT, logits_processor=lambda ids, scores: scores[1:])
    out = model.generate(PROMPT, max_new_tokens=9, num_beams=2, stopping_criteria=lambda ids: ids[-1] == 9)
    assert out.finish_reasons == ["length"] or out.ids[0][-1] == 9


@pytest.mark.parametrize("name", ["gpt2_bytelevel", "llama2_metaspace", "bert_uncased", "xlnet_unigram"])
def test_stop_strings_are_found_wherever_they_end(name: str, fixtures: Path) -> None:
    tokenizer = pf.Tokenizer.load(fixtures / "tokenizers" / name)
    config = {"model_type": "gpt2", "n_embd": 4, "n_layer": 1, "n_head": 1, "n_positions": 256}
    model = pf.Model.from_config({**config, "vocab_size": tokenizer.vocab_size})
    model.tokenizer = tokenizer
    text = "the naïve café — 你好, 🤗🤗 world!  Two spaces, and the end of it all; the end. " * 2
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    prompt, rest = ids[:3], ids[3:]
    options: dict[str, Any] = {"max_new_tokens": len(rest), "eos_token_id": []}
    # The model says the text, whatever it thinks.
    options["prefix_allowed_tokens_fn"] = lambda _, seen: [ids[len(seen)]]
    texts = [tokenizer.decode_after(prompt, rest[:n]) for n in range(1, len(rest) + 1)]
    rng = np.random.default_rng(0)
    for _ in range(12):
        at, length = rng.integers(0, len(texts[-1]) - 12), rng.integers(1, 12)
        stop = texts[-1][at : at + length]
        want = next(n for n, text in enumerate(texts, 1) if stop in text)
        out = model.generate([prompt], stop_strings=[stop, "not in it"], **options)
        assert (len(out.ids[0]), out.finish_reasons[0]) in ((want, "stop"), (len(rest), "length")), stop
        assert len(out.ids[0]) == want, stop


def test_time_ends_a_search(model: pf.Model) -> None:
    for options in ({}, {"num_beams": 2}):
        out = model.generate(PROMPT, max_new_tokens=50, eos_token_id=[], max_time=1e-9, **options)
        assert len(out.ids[0]) == 1
        assert out.finish_reasons == ["length"]


def test_stop_strings_across_tokens(tmp_path: Path, fixtures: Path) -> None:
    model = pf.load(fixtures / "models" / "gpt2")
    if model.tokenizer is None:
        (tmp_path / "text.txt").write_text("the cat sat on the mat")
        model.tokenizer = pf.Tokenizer.train([tmp_path / "text.txt"], kind="char", vocab_size=40)
    vocabulary = model.tokenizer.vocab_size
    options = {
        "do_sample": True, "seed": 2, "max_new_tokens": 40, "eos_token_id": [],
        "prefix_allowed_tokens_fn": lambda _, ids: range(vocabulary),
    }  # fmt: skip
    whole = model.generate(PROMPT, **options)
    stop = whole.texts[0][5:9]
    cut = model.generate(PROMPT, stop_strings=stop, **options)
    assert cut.ids[0] == whole.ids[0][: len(cut.ids[0])]
    assert len(cut.ids[0]) < 40
    assert stop in cut.texts[0]
    assert stop not in model.tokenizer.decode(cut.ids[0][:-1])
    assert cut.finish_reasons == ["stop"]

    async def pieces() -> list[str]:
        return [piece async for piece in model.astream(PROMPT, stop_strings=stop, **options)]

    assert "".join(asyncio.run(pieces())) == cut.texts[0]


def test_a_config_reads_and_writes_its_file(model: pf.Model, tmp_path: Path) -> None:
    config = pf.GenerationConfig(max_new_tokens=4, num_beams=3, early_stopping="never")
    config.save(tmp_path)
    assert pf.GenerationConfig.load(tmp_path) == config
    assert model.generate(PROMPT, config).ids == model.generate(PROMPT, **config.options).ids
    assert len(model.generate(PROMPT, config, max_new_tokens=2).ids[0]) == 2
    with pytest.raises(pf.errors.InputError, match="temprature"):
        pf.GenerationConfig(temprature=1)
    with pytest.raises(pf.errors.FileError, match=r"missing\.json"):
        pf.GenerationConfig.load(tmp_path / "missing.json")


def test_memory_that_is_not_there_is_told(
    fixtures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where pieces are read, after the call."""
    shutil.copytree(fixtures / "models" / "gpt2", tmp_path / "model")
    pf.Tokenizer.train(iter(["abc"]), preset="char").save(tmp_path / "model")
    model = pf.load(tmp_path / "model")
    from pyrformer.generation.call import Call

    def fails(self: Call, **_: Any) -> Any:
        raise MemoryError
        yield

    monkeypatch.setattr(Call, "run", fails)
    for ask in (lambda: model.generate(PROMPT), lambda: list(model.stream("abc"))):
        with pytest.raises(MemoryError, match=r"\[\w+\] out of memory: .*; ask for less at once"):
            ask()
