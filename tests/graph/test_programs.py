"""Programs as they are traced, rewritten and planned; nothing is executed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

import pyrformer as pf
from pyrformer.compile import Traced
from pyrformer.models import build
from pyrformer.models.base import Family
from pyrformer.nn import Trace
from pyrformer.nn import functional as F
from pyrformer.optimizers import AdamW
from pyrformer.programs import (
    Sizes,
    accumulate_step,
    decode_step,
    evaluate,
    forward,
    gradients,
    train_step,
    trainable,
)

CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "model_type": "gpt2",
        "n_layer": 2,
        "n_embd": 16,
        "n_head": 2,
        "vocab_size": 11,
        "n_positions": 8,
    },
    "bert": {
        "model_type": "bert",
        "num_hidden_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 11,
    },
}
PROGRAMS: dict[str, Callable[[Family, Sizes], Traced]] = {
    "forward": forward,
    "evaluate": evaluate,
    "gradients": gradients,
    "train_step": lambda family, sizes: train_step(family, sizes, AdamW()),
}
CASES = [(name, program) for name in CONFIGS for program in PROGRAMS]


def traced(name: str, program: str) -> Traced:
    family = build(CONFIGS[name])
    return PROGRAMS[program](family, Sizes(2, 8, 0 if family.objective == "ar" else 8))


@pytest.mark.parametrize(("name", "program"), CASES)
def test_tracing_is_reproducible(name: str, program: str) -> None:
    one, two = traced(name, program), traced(name, program)
    assert str(one.graph) == str(two.graph)
    assert one.lower().plan.to_json() == two.lower().plan.to_json()


@pytest.mark.parametrize(("name", "program"), CASES)
def test_passes_never_add_steps_and_settle(name: str, program: str) -> None:
    graph = traced(name, program).graph
    once = graph.optimise()
    assert len(once) < len(graph)
    assert str(once.optimise()) == str(once)


@pytest.mark.parametrize(("name", "program"), CASES)
def test_plans_are_consistent(name: str, program: str) -> None:
    plan = traced(name, program).lower().plan
    assert plan.live_bytes <= plan.arena_bytes <= 1.5 * plan.live_bytes
    assert plan.flops > 0
    assert plan.traffic_bytes > 0
    rows = plan.table()
    assert len(rows) == len(plan)
    assert sum(int(row[6]) for row in rows) == plan.flops
    assert isinstance(json.loads(plan.to_json()), dict)
    names = {state for state, _, _ in plan.states}
    parameters = {parameter for parameter, _ in build(CONFIGS[name]).named_parameters()}
    if program == "train_step":
        assert parameters <= names
        assert {n.removeprefix("optimizer.m.") for n in names if n.startswith("optimizer.m.")} <= parameters
        assert {output for output, _, _ in plan.outputs} == {"loss", "grad_norm"}
    else:
        assert names <= parameters


def test_gradients_have_the_shapes_of_their_parameters() -> None:
    for name in CONFIGS:
        outputs = {output: shape for output, _, shape in traced(name, "gradients").lower().plan.outputs}
        assert outputs.pop("loss") == []
        for parameter, value in build(CONFIGS[name]).named_parameters():
            assert tuple(outputs.pop(f"grad.{parameter}")) == value.shape
        assert outputs == {}


@pytest.mark.parametrize("name", CONFIGS)
def test_sums_of_gradients_are_taken_as_they_come(name: str) -> None:
    """Each gradient is added to its state by the step behind the one that makes it, and kept nowhere."""
    family = build(CONFIGS[name])
    sizes = Sizes(2, 8, 0 if family.objective == "ar" else 8)
    lowered, kept = accumulate_step(family, sizes).lower(), gradients(family, sizes, training=True).lower()
    steps = json.loads(lowered.plan.to_json())["steps"]
    sums = [
        i for i, s in enumerate(steps) if s["op"] == {"binary": "add"} and s["outputs"][0]["space"] != "arena"
    ]
    assert len(sums) == len(trainable(family))
    assert sum(i + 1 not in sums for i in sums[:-1]) > len(sums) // 2, "sums stand between products"
    assert not any(s["op"] == "copy" for s in steps)
    assert lowered.plan.arena_bytes < kept.plan.arena_bytes


def test_dropout_is_in_training_alone() -> None:
    assert "rng" in {name for name, _, _ in traced("gpt2", "train_step").lower().plan.inputs}
    for program in ("forward", "evaluate"):
        assert "rng" not in {name for name, _, _ in traced("gpt2", program).lower().plan.inputs}


def test_decoding_keeps_keys_and_values_in_place() -> None:
    plan = decode_step(build(CONFIGS["gpt2"]), 3, 1, (3, 8), "cache").lower().plan
    caches = {name: shape for name, _, shape in plan.states if name.startswith("cache")}
    assert len(caches) == 2 * 2  # keys and values of two layers
    assert all(shape[:2] == [3, 8] for shape in caches.values())
    assert [shape for name, _, shape in plan.outputs if name == "logits"] == [[3, 11]]


def test_shapes_that_do_not_fit_name_the_line() -> None:
    trace = Trace("float32")
    a, b = (trace.input(name, "float32", shape) for name, shape in (("a", (2, 3)), ("b", (4, 5))))
    with pytest.raises(pf.Error) as caught:
        F.linear(a, b)
    assert "\n" not in str(caught.value)
    assert "test_programs.py" in str(caught.value)


@pytest.mark.parametrize("shape", [(1 << 32, 1 << 32), (1 << 63, 2), (0, 1 << 62, 1 << 62), (1 << 47,)])
def test_sizes_beyond_all_memory_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(pf.Error, match="larger than any memory"):
        Trace().input("x", "int32", shape)
