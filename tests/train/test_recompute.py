"""Layers computed again in the backward pass: the same bits from less memory."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

import pyrformer as pf
from pyrformer.models import build
from pyrformer.optimizers import AdamW
from pyrformer.programs import Sizes, train_step

TEXT = "the cat sat on the mat, and the dog lay by the door. " * 60
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", "n_layer": 3, "n_embd": 16, "n_head": 2},
    "llama": {
        "model_type": "llama",
        "num_hidden_layers": 3,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    },
    "bert": {
        "model_type": "bert",
        "num_hidden_layers": 3,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    },
    "xlnet": {"model_type": "xlnet", "n_layer": 3, "d_model": 16, "n_head": 2, "d_inner": 32},
}
OBJECTIVES = {"bert": "mlm", "xlnet": "plm"}


def train(folder: Path, out: str, family: str, **more: Any) -> tuple[bytes, list[str]]:
    """The weights after a few updates, with dropout, and what was said."""
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    objective = OBJECTIVES.get(family, "ar")
    kind = {"preset": "bert-uncased", "vocab_size": 80} if objective != "ar" else {"kind": "char"}
    small = {"seq_len": 16, "batch_size": 4, "max_steps": 4, "warmup_steps": 1, "save_every": 0}
    config = pf.TrainConfig(
        files=[str(folder / "text.txt")],
        out=str(folder / out),
        objective=objective,
        model=MODELS[family],
        tokenizer=kind,
        **{**small, **more},
    )
    said: list[str] = []
    pf.train(config, lambda kind, n: said.append(n["what"]) if kind == "note" else None)
    return (folder / out / "model.safetensors").read_bytes(), said


@pytest.mark.parametrize("family", sorted(MODELS))
@pytest.mark.parametrize("accumulate", [1, 2])
def test_recomputed_is_kept_to_the_bit(tmp_path: Path, family: str, accumulate: int) -> None:
    more = {"gradient_accumulation_steps": accumulate}
    kept, silence = train(tmp_path, "kept", family, **more)
    again, said = train(tmp_path, "again", family, **more, recompute=True)
    assert kept == again
    assert not silence
    assert len(said) == 1
    assert "3 of 3 layers recomputed" in said[0]


def traced(batch: int = 8, tokens: int = 64) -> Any:
    config = {
        "model_type": "gpt2",
        "n_layer": 6,
        "n_embd": 32,
        "n_head": 2,
        "vocab_size": 50,
        "n_positions": 64,
    }
    return train_step(build(config), Sizes(batch, tokens), AdamW())


def test_each_layer_saves_memory_and_costs_arithmetic() -> None:
    graph = traced().graph.optimise()
    assert graph.layers() == [f"h.{i}" for i in range(6)]
    plans = [graph.recompute(count).lower() for count in range(7)]
    assert str(graph.recompute(0)) == str(graph)
    arena, flops = [p.arena_bytes for p in plans], [p.flops for p in plans]
    assert all(a < b for a, b in itertools.pairwise(flops))
    assert arena[6] < 0.5 * arena[0]
    # The forward pass is about a third of a step.
    assert flops[6] < 1.34 * flops[0]


def test_a_budget_takes_the_fewest_layers() -> None:
    plain = traced().lower()
    assert plain.recomputed == 0
    assert traced().lower(memory=plain.bytes).recomputed == 0
    smallest = traced().lower(recompute=True)
    between = traced().lower(memory=(plain.bytes + smallest.bytes) // 2)
    assert 0 < between.recomputed < 6
    assert between.bytes <= (plain.bytes + smallest.bytes) // 2
    fewer = traced().graph.optimise().recompute(between.recomputed - 1).lower()
    assert fewer.arena_bytes + fewer.state_bytes > (plain.bytes + smallest.bytes) // 2
    with pytest.raises(pf.Error, match="batch_size"):
        traced().lower(memory=smallest.plan.state_bytes)


def test_a_graph_without_a_backward_pass_has_no_layers() -> None:
    from pyrformer.programs import evaluate

    config = {
        "model_type": "gpt2",
        "n_layer": 2,
        "n_embd": 16,
        "n_head": 2,
        "vocab_size": 50,
        "n_positions": 8,
    }
    assert evaluate(build(config), Sizes(2, 8)).graph.optimise().layers() == []


def test_a_size_that_is_none_and_one_too_small(tmp_path: Path) -> None:
    with pytest.raises(pf.Error, match="memory"):
        train(tmp_path, "run", "gpt2", memory="much")
    with pytest.raises(pf.Error, match="batch_size"):
        train(tmp_path, "run", "gpt2", memory="10KB")
    assert not (tmp_path / "run").exists()
