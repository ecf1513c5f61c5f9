"""A learning rate and a batch size before a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import pyrformer as pf
from pyrformer.cli import main
from pyrformer.errors import InputError
from pyrformer.training.finders import find_batch_size, find_learning_rate

MODEL = {"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2}


@pytest.fixture
def config(tmp_path: Path) -> Any:
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat, and the dog lay by the door. " * 60, encoding="utf-8")

    def make(**more: Any) -> pf.TrainConfig:
        small: dict[str, Any] = {
            "seq_len": 16,
            "batch_size": 4,
            "tokenizer": {"kind": "char"},
            "model": MODEL,
        }
        return pf.TrainConfig(files=[str(path)], **{"out": str(tmp_path / "run"), **small, **more})

    return make


def test_the_rate_found_lies_where_learning_begins(config: Any, tmp_path: Path) -> None:
    search = find_learning_rate(config())
    assert 1e-4 < search.suggestion < 0.3
    assert min(search.losses) < 0.95 * search.losses[0]
    again = find_learning_rate(config())
    assert again == search
    assert not (tmp_path / "run").exists()
    with pytest.raises(pf.Error, match="low"):
        find_learning_rate(config(), low=1.0, high=0.1)


@pytest.mark.parametrize(
    "more", [{}, {"gradient_accumulation_steps": 2}, {"recompute": True, "optim": "adafactor"}]
)
def test_the_batch_found_is_the_largest_that_fits(config: Any, more: dict[str, Any]) -> None:
    """A run of so many rows keeps within the budget, one of a row more does not: it recomputes more or is refused."""
    rows, size = find_batch_size(config(**more), "2MB")
    assert rows > 4
    assert size <= 2_000_000

    def kept_within(rows: int) -> bool:
        said: list[str] = []
        run = config(**more, batch_size=rows, memory="2MB", max_steps=1, out=f"{config().out}{rows}")
        try:
            pf.train(run, lambda kind, n: said.append(n["what"]) if kind == "note" else None)
        except InputError:
            return False
        return "with 0 of" in said[0] or "recompute" in more

    assert kept_within(rows)
    assert not kept_within(rows + 1)
    bigger, _ = find_batch_size(config(**more), "4MB")
    assert bigger > rows
    with pytest.raises(pf.Error, match="one row"):
        find_batch_size(config(**more), "1KB")


def test_more_rows_fit_when_layers_are_recomputed(config: Any) -> None:
    assert find_batch_size(config(recompute=True), "4MB")[0] > find_batch_size(config(), "4MB")[0]


def test_on_the_command_line(config: Any) -> None:
    file = config().files[0]
    given = [
        "train",
        file,
        "--tokenizer",
        "char",
        "--layers",
        "1",
        "--width",
        "16",
        "--heads",
        "2",
        "--seq-len",
        "16",
    ]
    rates = CliRunner().invoke(main, [*given, "--batch-size", "4", "--find-lr"])
    assert rates.exit_code == 0, rates.output
    assert "--learning-rate" in rates.output
    rows = CliRunner().invoke(main, [*given, "--find-batch-size", "2MB"])
    assert rows.exit_code == 0, rows.output
    assert "--batch-size" in rows.output
