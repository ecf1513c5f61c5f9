"""The Python of the README and of the documents runs as it stands, on a small text."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import pyrformer as pf
from pyrformer.cli import main

README = Path(__file__).resolve().parents[2] / "README.md"
PYTHON = re.compile(r"```python\n(.*?)```", re.S)
SHELL = re.compile(r"```sh\n(.*?)```", re.S)
#: Documents with Python → what their blocks take as given.
GIVEN = {"generation.md": ("model", "prompt", "pf"), "pipelines.md": (), "tutorial.md": ()}


@pytest.mark.skipif(not README.is_file(), reason="no README beside the tests")
def test_the_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("corpus.txt").write_text("OTHELLO.\nThe cat sat on the mat, and the king of the hill slept.\n" * 80)
    (code,) = PYTHON.findall(README.read_text("utf-8"))
    small = (
        'out="runs/first", max_steps=2, seq_len=16, batch_size=2, tokenizer={"preset": "gpt2", "vocab_size": 300}, '
        'model={"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 128}'
    )
    assert 'out="runs/first"' in code
    ids = np.array([[1, 2, 3], [4, 5, 6]])
    given = {
        "input_ids": ids,
        "labels": ids,
        "logits": np.linspace(0, 5, 100, dtype=np.float32).reshape(2, 50),
    }
    exec(code.replace('out="runs/first"', small), given)
    assert capsys.readouterr().out
    assert (tmp_path / "a-copy" / "model.safetensors").is_file()
    assert np.isfinite(given["loss"])


@pytest.mark.skipif(not README.is_file(), reason="no documents beside the tests")
def test_the_quick_start_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (README.parent / "docs" / "quick-start.md").read_text("utf-8")
    lines = [line for block in SHELL.findall(text) for line in block.splitlines()]
    assert lines.pop(0) == "cp examples/shakespeare/train.txt shakespeare.txt"
    Path("shakespeare.txt").write_text("ROMEO.\nMy lord, the king is come: zqxj vvkw.\n" * 60)
    for line in lines:
        small = line.replace("--max-steps 2000", "--max-steps 2 --warmup-steps 1")
        command, *arguments = shlex.split(small)
        assert command == "pyrformer"
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 0, done.output
    for code in PYTHON.findall(text):
        exec(code, {})
    assert len(Path("scored.jsonl").read_text().splitlines()) == 120


@pytest.mark.skipif(not README.is_file(), reason="no documents beside the tests")
def test_documents_with_python_are_known() -> None:
    found = (p for p in README.parent.glob("docs/*.md") if PYTHON.search(p.read_text("utf-8")))
    assert {p.name for p in found} == {*GIVEN, "quick-start.md"}


@pytest.mark.skipif(not README.is_file(), reason="no documents beside the tests")
@pytest.mark.parametrize("name", GIVEN)
def test_the_blocks_of_a_document_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    given: dict[str, object] = {}
    if GIVEN[name]:
        pytest.importorskip("llguidance", reason="llguidance is not installed")
        config = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 256}
        tokenizer = pf.Tokenizer.train(iter(["It is now the king"] * 9), preset="gpt2", vocab_size=270)
        model = pf.Model.from_config({**config, "vocab_size": tokenizer.vocab_size}, tokenizer=tokenizer)
        model.save("runs/small")
        given = {"model": model, "prompt": "the king", "pf": pf}
    for block in PYTHON.findall((README.parent / "docs" / name).read_text("utf-8")):
        exec(block, given)
    assert capsys.readouterr().out
