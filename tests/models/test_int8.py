"""Weights kept in 8 bits: close to the floats, the same in every batch, and refused where they cannot serve."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyrformer as pf
from pyrformer.errors import Error, InputError

KINDS: list[dict[str, Any]] = [
    {"model_type": "gpt2", "n_embd": 96, "n_layer": 2, "n_head": 3, "n_positions": 128},
    {
        "model_type": "llama",
        "hidden_size": 72,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "intermediate_size": 130,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
    },
    {
        "model_type": "bert",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 100,
        "max_position_embeddings": 80,
    },
]


@pytest.fixture(params=KINDS, ids=lambda c: str(c["model_type"]))
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    pf.Model.from_config({**request.param, "vocab_size": 203}, seed=1).save(tmp_path)
    return tmp_path


def test_weights_are_rounded_by_output_feature(folder: Path) -> None:
    floats, model = pf.load(folder).state_dict(), pf.load(folder, load_in_8bit=True)
    rounded = 0
    for name, kept in model.state_dict().items():
        weight = floats[name]
        if np.array_equal(weight, kept):
            continue
        rounded += weight.size
        # GPT-2 stores [K, N], the others [N, K].
        inner = 0 if model.config["model_type"] == "gpt2" and "wte" not in name else 1
        assert weight.ndim == 2
        step = np.abs(weight).max(inner, keepdims=True) / 127
        assert (np.abs(weight - kept) <= step * (0.5 + 1e-5)).all(), name
    assert rounded > 0.6 * sum(weight.size for weight in floats.values() if weight.ndim == 2)


def test_logits_are_those_of_the_rounded_weights(folder: Path) -> None:
    model = pf.load(folder, load_in_8bit=True)
    floats = pf.load(folder)
    original = floats(np.arange(3, 40)[None]).logits
    floats.load_state_dict(model.state_dict())
    ids = np.random.default_rng(0).integers(3, 203, (3, 37))
    rounded = floats(ids).logits
    # Activations are rounded too, to 1/4095 of the largest of their row.
    assert np.abs(model(ids).logits - rounded).max() < 2e-3 * np.abs(rounded).max()
    near = model(np.arange(3, 40)[None]).logits
    assert 0 < np.abs(near - original).max() < 0.1 * original.std()


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=str)
def test_no_bit_depends_on_the_batch(folder: Path, options: dict[str, Any]) -> None:
    model = pf.load(folder, load_in_8bit=True)
    if model.family.objective != "ar":
        return
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 203, n).tolist() for n in (1, 5, 17, 50, 64, 66, 70)]
    options = {"max_new_tokens": 5, "min_new_tokens": 5, **options}
    together = model.generate(prompts, **options)
    for i, prompt in enumerate(prompts):
        alone = model.generate([prompt], **options)
        assert alone.ids[0] == together.ids[i]
        assert np.array_equal(alone.token_logprobs[0], together.token_logprobs[i])


def test_scores_and_vectors_are_close(folder: Path) -> None:
    floats, model = pf.load(folder), pf.load(folder, load_in_8bit=True)
    ids = [np.random.default_rng(1).integers(3, 203, 30).tolist()]
    mask = {"mask_token_id": 4} if floats.family.objective == "mlm" else {}
    a, b = (m.score(ids, **mask).log_likelihood[0] for m in (floats, model))
    assert a != b
    assert abs(a - b) < 0.02 * abs(a)
    a, b = (m.embed(ids)[0] for m in (floats, model))
    assert np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b) > 0.999


def test_a_copy_by_pickle_keeps_its_bits(folder: Path) -> None:
    model = pf.load(folder, load_in_8bit=True)
    again = pickle.loads(pickle.dumps(model))
    ids = np.arange(3, 20)[None]
    assert again.in_8bit
    assert np.array_equal(again(ids).logits, model(ids).logits)


def test_what_needs_floats_is_refused(folder: Path, tmp_path: Path) -> None:
    model = pf.load(folder, load_in_8bit=True)
    with pytest.raises(InputError, match="load_in_8bit"):
        model.save(tmp_path / "copy")
    ids = np.arange(3, 20)[None]
    with pytest.raises(Error, match="8 bits"):
        model.loss_and_grads(ids, labels=ids)
    with pytest.raises(Error, match="8 bits"):
        model.load_state_dict(pf.load(folder).state_dict())
    with pytest.raises(InputError, match="float32 on the CPU"):
        pf.load(folder, load_in_8bit=True, dtype="float64")


CACHED: dict[str, Any] = {"cache_implementation": "quantized", "max_new_tokens": 12, "min_new_tokens": 12}


@pytest.mark.parametrize("folder", KINDS[:2], indirect=True, ids=lambda c: str(c["model_type"]))
@pytest.mark.parametrize("in_8bit", [False, True])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 4}], ids=str)
def test_keys_and_values_in_8_bits(folder: Path, options: dict[str, Any], in_8bit: bool) -> None:
    model = pf.load(folder, load_in_8bit=in_8bit)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 203, n).tolist() * 2 for n in (1, 2, 9, 16, 33)]
    together = model.generate(prompts, **CACHED, **options)
    for i, prompt in enumerate(prompts):
        alone = model.generate([prompt], **CACHED, **options)
        assert alone.ids[0] == together.ids[i]
        assert alone.token_logprobs[0] == together.token_logprobs[i]
    # The first token follows the prompt's own keys; rounding them moves its log-probability a little.
    floats = model.generate(prompts, max_new_tokens=1, output_steps=5)
    rounded = model.generate(prompts, max_new_tokens=1, cache_implementation="quantized", output_steps=5)
    away = [abs(a[0] - b[0]) for a, b in zip(floats.token_logprobs, rounded.token_logprobs, strict=True)]
    assert 0 < max(away) < 0.02


@pytest.mark.parametrize("folder", KINDS[:1], indirect=True, ids=lambda c: str(c["model_type"]))
def test_a_cache_in_8_bits_is_refused_where_there_is_none(folder: Path) -> None:
    model = pf.load(folder, dtype="float64")
    with pytest.raises(InputError, match="float32 on the CPU"):
        model.generate([[5]], **CACHED)
    with pytest.raises(InputError, match="'dynamic' or 'quantized'"):
        pf.load(folder).generate([[5]], cache_implementation="static")
