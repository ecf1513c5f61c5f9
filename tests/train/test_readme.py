"""The Python of the README runs as it stands, on a small text."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

README = Path(__file__).resolve().parents[2] / "README.md"


@pytest.mark.skipif(not README.is_file(), reason="no README beside the tests")
def test_the_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("corpus.txt").write_text("OTHELLO.\nThe cat sat on the mat, and the king of the hill slept.\n" * 80)
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.S)
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
