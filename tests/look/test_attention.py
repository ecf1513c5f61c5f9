"""Attention weights: rows sum to 1, and they are those that the model itself uses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import pyrformer as pf
from pyrformer.compile import Traced
from pyrformer.errors import Error
from pyrformer.look import relative_weights, weights
from pyrformer.nn import Trace
from pyrformer.nn import functional as F
from pyrformer.programs import batch_inputs

MODELS = [
    "bert_mlm",
    "falcon_40b_style",
    "falcon_7b_style",
    "falcon_rw_style",
    "gpt2",
    "gpt_neox",
    "llama_gqa_tied",
    "mistral_window",
    "modernbert_mlm",
    "opt",
    "qwen3",
]


@pytest.mark.parametrize("name", MODELS)
def test_weights_times_values_are_what_the_layer_gives(fixtures: Path, name: str) -> None:
    model = pf.load(fixtures / "models" / name)
    rng = np.random.default_rng(1)
    ids = rng.integers(6, 200, (2, 9))
    mask = np.ones((2, 9), np.int32)
    mask[1, 6:] = 0
    batch = model.batch(ids, attention_mask=mask)
    trace = Trace()
    x = batch_inputs(trace, model.family, batch.sizes)
    model.family.hidden_states(x)
    for layer, (operands, spec) in x.seen.items():
        q, k, v, bias = operands["q"], operands["k"], operands["v"], operands.get("key_bias")
        y = F.attention(q, k, v, spec, segments=x.segments, key_bias=bias)
        given = {"q": q, "k": k, "v": v, "bias": bias, "y": y}
        for key, value in given.items():
            if value is not None:
                trace.output(f"{key}.{layer}", value)
    out = Traced("test", trace).lower().compile(model.store)(**batch.arrays)
    for layer, (_, spec) in x.seen.items():
        w = weights(
            out[f"q.{layer}"],
            out[f"k.{layer}"],
            spec,
            segments=batch.arrays["segments"],
            key_bias=out.get(f"bias.{layer}"),
        )
        heads, kv = spec["heads"], spec["kv_heads"]
        v = np.repeat(out[f"v.{layer}"].reshape(2, 9, kv, -1), heads // kv, axis=2)
        got = np.einsum("bhij,bjhd->bihd", w, v).reshape(2, 9, -1)
        np.testing.assert_allclose(got, out[f"y.{layer}"], atol=2e-5)


@pytest.mark.parametrize("name", MODELS)
def test_shapes_and_masks(fixtures: Path, name: str) -> None:
    model = pf.load(fixtures / "models" / name)
    found = model.attention([7, 9, 30, 21, 5, 80, 44])
    states = model([[7, 9]], output_hidden_states=True).hidden_states or []
    assert len(found) == len(states) - 1
    for w in found:
        assert w.dtype == np.float32
        assert w.shape[1:] == (7, 7)
        np.testing.assert_allclose(w.sum(-1), 1, atol=1e-6)
        if model.family.objective == "ar":
            assert (np.triu(w, 1) == 0).all()
    if name == "mistral_window":
        assert (np.tril(found[0], -5) == 0).all()


@pytest.mark.parametrize("permuted", [False, True])
def test_relative_weights_times_values_are_what_the_layer_gives(fixtures: Path, permuted: bool) -> None:
    model = pf.load(fixtures / "models" / "xlnet")
    rng = np.random.default_rng(1)
    ids, types = rng.integers(6, 200, (2, 9)), rng.integers(0, 3, (2, 9))
    mask = (rng.random((2, 9, 9)) < 0.5).astype(np.int32) if permuted else None
    batch = model.batch(ids, token_type_ids=types, perm_mask=mask)
    trace = Trace()
    x = batch_inputs(trace, model.family, batch.sizes)
    model.family.hidden_states(x)
    assert x.token_type_ids is not None
    for layer, (operands, spec) in x.seen.items():
        q, q_r, q_s, k, v, r, kinds = (operands[n] for n in ("q", "q_r", "q_s", "k", "v", "r", "kinds"))
        places = (x.position_ids, x.token_type_ids, x.token_type_ids)
        y = F.relative_attention(
            (q, q_r, q_s), k, v, r, kinds, *places, **spec, hidden=x.hidden, sees_itself=True
        )
        for name, value in {**operands, "y": y}.items():
            trace.output(f"{name}.{layer}", value)
    out = Traced("test", trace).lower().compile(model.store)(**batch.arrays)
    for layer, (operands, spec) in x.seen.items():
        given = {name: out[f"{name}.{layer}"] for name in operands}
        w = relative_weights(given, spec, batch.arrays["token_type_ids"], batch.arrays.get("hidden"))
        np.testing.assert_allclose(w.sum(-1), 1, atol=1e-12)
        v = given["v"].reshape(2, 9, spec["heads"], -1)
        np.testing.assert_allclose(
            np.einsum("bhij,bjhd->bihd", w, v).reshape(2, 9, -1), out[f"y.{layer}"], atol=2e-5
        )


def test_attention_of_a_permutation_model_follows_its_mask(fixtures: Path) -> None:
    model = pf.load(fixtures / "models" / "xlnet")
    ids = [7, 9, 30, 21, 5]
    for w in model.attention(ids):
        assert w.shape[1:] == (5, 5)
        assert (w > 0).all()
    for w in model.attention(ids, perm_mask=np.triu(np.ones((1, 5, 5)))):
        assert (np.triu(w, 1) == 0).all()
        np.testing.assert_allclose(w.sum(-1), 1, atol=1e-6)


def test_refusals(fixtures: Path) -> None:
    with pytest.raises(Error, match="no tokens"):
        pf.load(fixtures / "models" / "gpt2").attention([])
