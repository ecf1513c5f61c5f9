"""Positions and activations against the reference tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from pyrformer import _core
from pyrformer.compile import Traced
from pyrformer.errors import ConfigError
from pyrformer.models.positions import alibi_slopes, rope, rope_parameters, sinusoids
from pyrformer.nn import Trace
from pyrformer.nn import functional as F


@pytest.fixture
def reference(fixtures: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    folder = fixtures / "positions"
    return json.loads((folder / "positions.json").read_text()), load_file(folder / "positions.safetensors")


def run(trace: Trace, **inputs: np.ndarray) -> dict[str, np.ndarray]:
    return Traced("test", trace).lower().compile(_core.Store())(**inputs)


def test_sinusoids(reference: Any) -> None:
    about, tensors = reference
    for positions, width in about["sinusoidal"]["shapes"]:
        want = tensors[f"sinusoidal.{positions}x{width}"]
        assert np.abs(sinusoids(positions, width) - want).max() < 1e-7


def test_rope(reference: Any) -> None:
    about, tensors = reference
    for case in about["rope"]["cases"]:
        name, d, n = case["name"], case["head_dim"], case["n_positions"]
        found = rope(case["rope_parameters"], d, case["max_position_embeddings"], n, "test")
        assert found.scale == pytest.approx(case["attention_scaling"], rel=1e-6), name
        np.testing.assert_allclose(found.inv_freq, tensors[f"rope.{name}.inv_freq"], rtol=1e-5, err_msg=name)
        want = tensors[f"rope.{name}.q_rotated"]
        heads, rows = want.shape[0], want.shape[1]
        trace = Trace("float64")
        positions = trace.input("positions", "int32", (rows,))
        x = trace.input("x", "float64", (rows, heads * d))
        table = F.rope_table(positions, found.inv_freq, found.scale)
        trace.output("table", table)
        trace.output("y", F.rope(x, table, heads))
        q = tensors[f"rope.{name}.q"].swapaxes(0, 1).reshape(rows, heads * d)
        at = np.arange(rows, dtype=np.int32) * 7
        out = run(trace, positions=at, x=q.astype(np.float64))
        for half, kind in enumerate(("cos", "sin")):
            got = out["table"][:, half * d // 2 : (half + 1) * d // 2]
            np.testing.assert_allclose(got, tensors[f"rope.{name}.{kind}"][at, : d // 2], atol=3e-5)
        got = out["y"].reshape(rows, heads, d).swapaxes(0, 1)
        np.testing.assert_allclose(got, want, atol=1e-4, err_msg=name)


def test_alibi(reference: Any) -> None:
    about, tensors = reference
    for heads, case in about["alibi"]["slopes"].items():
        np.testing.assert_allclose(alibi_slopes(int(heads)), case["slopes"], rtol=1e-12)
    mask, heads = tensors["alibi.mask"], about["alibi"]["heads_in_example"]
    trace = Trace("float32")
    positions = trace.input("positions", "int32", mask.shape)
    trace.output("bias", F.alibi_bias(positions, alibi_slopes(heads), rounded=True))
    counted = ((np.cumsum(mask, 1) - 1) * mask).astype(np.int32)
    assert np.array_equal(run(trace, positions=counted)["bias"], tensors["alibi.bias"])


def test_activations(reference: Any) -> None:
    about, tensors = reference
    x = tensors["activation.x"]
    for name in about["activations"]["names"]:
        trace = Trace("float64")
        value = trace.state("x", x.shape)
        y = F.activation(name, value)
        trace.output("y", y)
        total = trace.apply("sum_to", y, declared=("float64", []))[0]
        trace.output("dy", trace.gradients(total, [value])[0])
        store = _core.Store()
        store.set("x", x)
        out = Traced("test", trace).lower().compile(store)()
        np.testing.assert_allclose(out["y"], tensors[f"activation.{name}"], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(out["dy"], tensors[f"activation_grad.{name}"], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"rope_type": "spiral"}, "spiral"),
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "linear", "factor": -1}, "factor"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_theta": "big"}, "rope_theta"),
        ({"partial_rotary_factor": 0.1}, "columns"),
        ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}, "factors"),
        ({"rope_type": "llama3", "factor": 8.0}, "low_freq_factor"),
    ],
)
def test_senseless_parameters_are_refused(parameters: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        rope(parameters, 8, 64, 10, "llama")


def test_older_keys() -> None:
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert rope_parameters(old) == {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}
    assert rope_parameters({"rotary_emb_base": 10000, "rotary_pct": 0.25, "rope_scaling": None}) == {
        "rope_theta": 10000,
        "partial_rotary_factor": 0.25,
        "rope_type": "default",
    }
