"""Generation against reference sequences and scores, and the laws that decoding obeys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyrformer as pf

#: Settings about padding and caching, which results do not depend on here.
NOT_OURS = {"pad_token_id", "use_cache"}


def cases(fixtures: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    reference = json.loads((fixtures / "decoding" / "gpt2.json").read_text())
    return reference, reference["cases"]


def cut(sequence: list[int], prompt: int, eos: int) -> list[int]:
    """The new tokens up to the first end token; what follows is filler."""
    new = sequence[prompt:]
    return new[: new.index(eos) + 1] if eos in new else new


def test_sequences_and_scores_of_the_reference(fixtures: Path) -> None:
    reference, all_cases = cases(fixtures)
    model = pf.load(fixtures / "models" / "gpt2")
    checked = 0
    for case in all_cases:
        prompt = reference["prompts"][case["prompts"]]
        ids, mask = np.array(prompt["input_ids"]), np.array(prompt["attention_mask"])
        settings = {k: v for k, v in case["settings"].items() if k not in NOT_OURS}
        eos = settings.get("eos_token_id", model.generation_config["eos_token_id"])
        out = model.generate(ids, attention_mask=mask, **settings)
        ends = [eos] if isinstance(eos, int) else eos
        for got, want in zip(out.ids, case["sequences"], strict=True):
            new = want[ids.shape[1] :]
            stop = next((i + 1 for i, t in enumerate(new) if t in ends), len(new))
            assert got == new[:stop], case["name"]
        if case.get("sequences_scores"):
            for got_score, score in zip(out.scores, case["sequences_scores"], strict=True):
                assert got_score == pytest.approx(score, abs=1e-4 * max(1, abs(score))), case["name"]
        checked += 1
    assert checked > 100


@pytest.mark.parametrize("options", [{"do_sample": True, "top_p": 0.9, "seed": 7}, {"num_beams": 3}, {}])
def test_a_batch_gives_what_each_prompt_gives_alone(fixtures: Path, options: dict[str, Any]) -> None:
    model = pf.load(fixtures / "models" / "gpt2")
    prompts = [[5, 6, 7, 8, 9], [40], [100, 3, 9]]
    together = model.generate(prompts, max_new_tokens=20, **options)
    if not options.get("do_sample"):  # draws are keyed by the place in the batch
        for i, prompt in enumerate(prompts):
            alone = model.generate([prompt], max_new_tokens=20, **options)
            assert alone.ids[0] == together.ids[i]
            assert np.array_equal(alone.token_logprobs[0], together.token_logprobs[i])
    assert model.generate(prompts, max_new_tokens=20, **options).ids == together.ids


KINDS: list[dict[str, Any]] = [
    {"model_type": "gpt2", "n_embd": 96, "n_layer": 2, "n_head": 3, "n_positions": 256},
    {
        "model_type": "llama",
        "hidden_size": 72,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "intermediate_size": 130,
        "max_position_embeddings": 256,
    },
    {
        "model_type": "mistral",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "intermediate_size": 100,
        "max_position_embeddings": 256,
        "sliding_window": 21,
    },
    {
        "model_type": "falcon",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "alibi": True,
        "multi_query": False,
        "parallel_attn": False,
        "bias": True,
    },
]


@pytest.mark.parametrize("config", KINDS, ids=lambda c: str(c["model_type"]))
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 4}], ids=str)
def test_no_bit_depends_on_the_batch(config: dict[str, Any], options: dict[str, Any]) -> None:
    model = pf.Model.from_config({**config, "vocab_size": 203}, seed=1)
    rng = np.random.default_rng(0)
    # Lengths on both sides of the blocks of kernels; a repeated piece, for lookups to find.
    prompts = [rng.integers(3, 203, n).tolist() * 2 for n in (1, 2, 3, 9, 16, 33, 50, 64, 65, 70)]
    options = {"max_new_tokens": 9, "min_new_tokens": 9, **options}
    together = model.generate(prompts, **options)
    for i, prompt in enumerate(prompts):
        alone = model.generate([prompt], **options)
        assert alone.ids[0] == together.ids[i]
        assert np.array_equal(alone.token_logprobs[0], together.token_logprobs[i]), len(prompt)


def test_checking_drafts_in_one_pass_changes_no_bit() -> None:
    model = pf.Model.from_config({**KINDS[0], "vocab_size": 31}, seed=4)
    prompt = [5, 6, 7, 8] * 9
    plain = model.generate([prompt], max_new_tokens=60)
    drafted = model.generate([prompt], max_new_tokens=60, prompt_lookup_num_tokens=5)
    assert drafted.ids == plain.ids
    assert np.array_equal(drafted.token_logprobs[0], plain.token_logprobs[0])


def test_log_probabilities_are_those_of_the_forward_pass(fixtures: Path) -> None:
    model = pf.load(fixtures / "models" / "gpt2", dtype="float64")
    prompt = [9, 8, 7]
    out = model.generate([prompt], max_new_tokens=12, do_sample=True, seed=3)
    ids = prompt + out.ids[0]
    logits = model(np.array([ids])).logits[0]
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    want = [logprobs[len(prompt) - 1 + i, t] for i, t in enumerate(out.ids[0])]
    assert np.allclose(out.token_logprobs[0], want, atol=1e-5)


def test_text_goes_on_beyond_the_positions(fixtures: Path) -> None:
    model = pf.load(fixtures / "models" / "gpt2")
    options = {
        "max_new_tokens": 150,
        "eos_token_id": [],
        "do_sample": True,
        "num_return_sequences": 3,
        "seed": 1,
    }
    out = model.generate([[5, 6, 7]], **options)
    assert [len(ids) for ids in out.ids] == [150, 150, 150]
    assert out.finish_reasons == ["length"] * 3
    assert model.generate([[5, 6, 7]], max_new_tokens=150, eos_token_id=[], num_beams=3).ids[0]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temprature": 1.0}, "temprature"),
        ({"temperature": 0.5}, "temperature"),
        ({"do_sample": True, "top_p": 1.5}, "top_p"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"num_beams": "four"}, "num_beams"),
        ({"num_return_sequences": 3}, "num_return_sequences"),
        ({"num_return_sequences": 2**40, "do_sample": True}, "num_return_sequences"),
        ({"num_beams": 2**40}, "num_beams"),
        ({"max_new_tokens": "a"}, "max_new_tokens"),
        ({"max_length": 2**64}, "max_length"),
    ],
)
def test_wrong_options_are_named(fixtures: Path, options: dict[str, Any], named: str) -> None:
    model = pf.load(fixtures / "models" / "gpt2")
    with pytest.raises(pf.errors.InputError, match=named):
        model.generate([[5]], **options)


def test_filtered_distributions_of_the_reference(fixtures: Path) -> None:
    from safetensors.numpy import load_file

    cases = json.loads((fixtures / "sampling" / "filters.json").read_text())["cases"]
    tensors = load_file(fixtures / "sampling" / "filters.safetensors")
    for case in cases:
        i = case["index"]
        rows = tensors[f"exact.{i}"].astype(bool)
        got = pf.filter_logits(tensors["logits"], **case["settings"])
        assert np.abs(got - tensors[f"probs.{i}"])[rows].max() <= 1e-6, case


@pytest.mark.parametrize("config", KINDS, ids=lambda c: str(c["model_type"]))
def test_decoding_leaves_the_weights_as_they_are(config: dict[str, Any], tmp_path: Path) -> None:
    """Generation keeps weights in an order of its own; saving, setting, scoring and training do not see it."""
    model = pf.Model.from_config({**config, "vocab_size": 203}, seed=3)
    model.save(tmp_path / "fresh")
    prompts, options = [[5, 6, 7], [8] * 40], {"max_new_tokens": 7, "min_new_tokens": 7}
    ids = np.random.default_rng(1).integers(3, 203, (2, 30))
    before, logits, loss = model.state_dict(), model(ids).logits, model.loss_and_grads(ids, ids)
    # A program with gradients was bound before, and one after.
    fresh = pf.load(tmp_path / "fresh")
    assert fresh.generate(prompts, **options).ids == model.generate(prompts, **options).ids
    for other in (model, fresh):
        after = other.state_dict()
        assert all(np.array_equal(after[name], value) for name, value in before.items())
        assert np.array_equal(other(ids).logits, logits)
    assert fresh.loss_and_grads(ids, ids)[0] == loss[0]
    changed = {name: np.roll(value, 1, axis=0) for name, value in before.items()}
    for each in (model, fresh):
        each.load_state_dict(changed)
    again = fresh.generate(prompts, **options)
    assert again.token_logprobs == model.generate(prompts, **options).token_logprobs
    fresh.save(tmp_path / "changed")
    assert pf.load(tmp_path / "changed").generate(prompts, **options).token_logprobs == again.token_logprobs


@pytest.mark.parametrize(
    "config", [*KINDS, {**KINDS[0], "n_positions": 24}], ids=lambda c: str(c["model_type"])
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "num_return_sequences": 3, "seed": 5},
        {"num_beams": 4, "num_return_sequences": 2},
    ],
    ids=str,
)
def test_the_loop_of_the_core_is_that_of_python(config: dict[str, Any], options: dict[str, Any]) -> None:
    """Where functions of the caller's are called, each step passes through Python; otherwise none does."""
    model = pf.Model.from_config({**config, "vocab_size": 61}, seed=2)
    prompts = [[5, 6, 7, 8], [9], [10, 11] * 6]
    # Some sequences end early, so that the rest go on in smaller programs.
    options = {"max_new_tokens": 40, "eos_token_id": list(range(50, 54)), **options}
    inside = model.generate(prompts, **options)
    seen: list[int] = []
    outside = model.generate(
        prompts, stopping_criteria=lambda ids: seen.append(len(ids)) is not None, **options
    )
    assert seen
    assert inside.ids == outside.ids
    assert inside.token_logprobs == outside.token_logprobs
    assert inside.scores == outside.scores
    assert inside.finish_reasons == outside.finish_reasons
