"""Attention weights: rows sum to 1, and they are those that the model itself uses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import pyrformer as pf
from pyrformer.compile import Traced
from pyrformer.errors import Error
from pyrformer.look import weights
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
    for layer, (q, k, v, bias, spec) in x.seen.items():
        y = F.attention(q, k, v, spec, segments=x.segments, key_bias=bias)
        given = {"q": q, "k": k, "v": v, "bias": bias, "y": y}
        for key, value in given.items():
            if value is not None:
                trace.output(f"{key}.{layer}", value)
    out = Traced("test", trace).lower().compile(model.store)(**batch.arrays)
    for layer, (_, _, _, _, spec) in x.seen.items():
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


def test_refusals(fixtures: Path) -> None:
    with pytest.raises(Error, match="XLNet"):
        pf.load(fixtures / "models" / "xlnet").attention([1, 2])
    with pytest.raises(Error, match="no tokens"):
        pf.load(fixtures / "models" / "gpt2").attention([])
