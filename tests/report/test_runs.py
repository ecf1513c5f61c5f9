"""What run folders say of themselves: `pyrformer runs` and the record behind it and the report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import pyrformer as pf
from pyrformer.cli import main
from pyrformer.report.runs import Record, find

MODEL = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 16}


def fields(folder: Path, **options: object) -> dict[str, object]:
    """Options of a run of moments."""
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 40)
    base = {"model": MODEL, "tokenizer": {"kind": "char"}, "batch_size": 4, "warmup_steps": 2}
    return {"files": [str(text)], **base, "max_steps": 6, "eval_every": 3, "log_every": 2, **options}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run, "a", and one below another folder, "more/b"."""
    top = tmp_path_factory.mktemp("runs")
    for name, rate in (("a", 1e-3), ("more/b", 1e-2)):
        pf.train(pf.TrainConfig(**fields(top, out=str(top / name), learning_rate=rate)))
    return top


def listed(folder: Path) -> list[dict[str, object]]:
    result = CliRunner().invoke(main, ["runs", str(folder), "--json"])
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_lines_say_what_was_trained(runs: Path) -> None:
    first, second = listed(runs)
    assert (first["name"], second["name"]) == ("a", "more/b")
    model = pf.load(runs / "a")
    assert first["family"] == "gpt2"
    assert first["parameters"] == model.parameter_count
    assert (first["step"], first["steps"], first["state"]) == (6, 6, "finished")
    assert first["tokens"] == 6 * 4 * 16
    rows = [json.loads(line) for line in (runs / "a" / "metrics.jsonl").read_text().splitlines()]
    assert first["loss"] == [r["loss"] for r in rows if "loss" in r][-1]
    assert first["best"] == min(r["valid_loss"] for r in rows if "valid_loss" in r)


def test_the_table_fits_into_80_columns(runs: Path) -> None:
    long = runs.parent / "long"
    folder = long / ("a-very-long-name-" * 6)
    folder.mkdir(parents=True)
    for name in ("training.json", "config.json"):
        (folder / name).write_bytes((runs / "a" / name).read_bytes())
    row = {"step": 123456, "loss": 12.3456789, "seconds": 123456.0}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    options = json.loads((folder / "training.json").read_text())
    (folder / "training.json").write_text(json.dumps({**options, "max_steps": 1000000}))
    for where in (runs, long):
        output = CliRunner().invoke(main, ["runs", str(where)]).stdout
        assert max(map(len, output.splitlines())) <= 80
    assert "123456/1000000" in output
    assert "stopped" in output
    assert "12.35" in output
    assert "1.43d" in output


def test_a_name_cannot_steer_the_terminal(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "\x1b[2J[red]x").symlink_to(runs / "a")
    folder = tmp_path / "\x1b[2J[red]y"
    folder.mkdir()
    (folder / "training.json").write_text("{}")
    output = CliRunner().invoke(main, ["runs", str(tmp_path)]).stdout
    assert "\x1b" not in output
    assert "?[2J[red]y" in output


def test_states(runs: Path, tmp_path: Path) -> None:
    text = fields(tmp_path, out=str(tmp_path / "run"))
    states = []

    def watch(kind: str, _numbers: dict[str, object]) -> None:
        if kind == "step":
            # Seen by another process: a lock of this one would not stop itself.
            code = "import sys, pathlib; from pyrformer.report.runs import Record; "
            code += "print(Record.read(pathlib.Path(sys.argv[1])).summary('x').state)"
            done = subprocess.run(
                [sys.executable, "-c", code, str(tmp_path / "run")],
                capture_output=True,
                text=True,
                check=True,
            )
            states.append(done.stdout.strip())

    pf.train(pf.TrainConfig(**{**text, "max_steps": 1}), on_event=watch)
    assert states == ["running"]
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0, "loss": 1}\n')
    assert listed(tmp_path / "run")[0]["state"] == "stopped"
    (tmp_path / "run" / "failed-step-1").mkdir()
    assert listed(tmp_path / "run")[0]["state"] == "failed"
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 1}\n')
    assert listed(tmp_path / "run")[0]["state"] == "finished"


def test_broken_rows_and_runs(runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    folder.mkdir()
    (folder / "training.json").write_text("{}")
    (folder / "metrics.jsonl").write_text(
        '{"step": 2, "loss": NaN}\n{"step": 4, "loss": "x"}\n{"step": 6, "lo'
    )
    record = Record.read(folder)
    assert [row["step"] for row in record.rows] == [2, 4]
    assert record.values("loss") == []
    line = listed(tmp_path)[0]
    assert line["loss"] is None
    assert line["parameters"] is None
    assert line["tokens"] is None
    assert line["step"] == 4
    assert "half" in CliRunner().invoke(main, ["runs", str(tmp_path)]).stdout
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "training.json").write_text("[")
    result = CliRunner().invoke(main, ["runs", str(tmp_path)])
    assert result.exit_code == 0
    assert "left out" in result.stderr
    assert "half" in result.stdout


def test_find(runs: Path, tmp_path: Path) -> None:
    assert [str(p.relative_to(runs)) for p in find(runs)] == ["a", "more/b"]
    assert find(runs / "a") == [runs / "a"]
    assert CliRunner().invoke(main, ["runs", str(tmp_path)]).stdout == f"no runs in {tmp_path}\n"
    result = CliRunner().invoke(main, ["runs", str(tmp_path / "none")])
    assert result.exit_code == 2
    assert result.stderr.startswith("pyrformer: error: [runs] there is no folder")
