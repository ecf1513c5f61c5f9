"""The examples, run as they stand with the real libraries; and results as Arrow tables."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import pyrformer as pf
from pyrformer.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "examples" / "pipelines").glob("*.py"))
TEXT = "Good night, sweet prince. My lord, the king is come. To be, or not to be? Enter three witches."


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = pf.Tokenizer.train(iter([TEXT] * 3), kind="bpe", vocab_size=300)
    config = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    model = pf.Model.from_config({**config, "vocab_size": tokenizer.vocab_size}, tokenizer=tokenizer)
    folder = tmp_path_factory.mktemp("examples") / "run"
    model.save(folder)
    return folder


def needs(script: Path) -> list[str]:
    """The libraries that a script imports."""
    imports = [
        n
        for n in ast.walk(ast.parse(script.read_text("utf-8")))
        if isinstance(n, (ast.Import, ast.ImportFrom))
    ]
    names = {alias.name for n in imports if isinstance(n, ast.Import) for alias in n.names}
    names |= {n.module or "" for n in imports if isinstance(n, ast.ImportFrom)}
    return sorted({name.split(".")[0] for name in names} - {"pyrformer", "numpy"} - sys.stdlib_module_names)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_example_runs(script: Path, run: Path, tmp_path: Path) -> None:
    for name in needs(script):
        if find_spec(name) is None:
            pytest.skip(f"{name} is not installed: pip install --group examples")
    done = subprocess.run(
        [sys.executable, str(script), str(run)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env={
            "PATH": "/usr/bin:/bin",
            "HF_HOME": str(tmp_path),
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": ":".join(sys.path),
        },
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_examples_are_short_and_listed() -> None:
    listed = (ROOT / "examples" / "pipelines" / "README.md").read_text("utf-8")
    assert len(SCRIPTS) >= 6
    for script in SCRIPTS:
        assert len(script.read_text("utf-8").splitlines()) < 40
        assert f"]({script.name})" in listed


def test_scores_and_generations_are_tables(run: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    model = pf.load(run)
    texts = ["Good night", "Enter", "To be, or not to be? "]
    scores = model.score(texts)
    table = arrow.table(scores)
    assert table.num_rows == 3
    assert table["log_likelihood"].to_pylist() == scores.log_likelihood.tolist()
    assert table["token_logprobs"].to_pylist() == [t.tolist() for t in scores.token_logprobs]
    drawn = model.generate(texts, max_new_tokens=4)
    table = drawn.to_arrow()
    assert table["text"].to_pylist() == drawn.texts
    assert table["ids"].to_pylist() == drawn.ids
    assert table["finish_reason"].to_pylist() == drawn.finish_reasons


def test_classes_are_tables() -> None:
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    for kind in ("Sequence", "Token"):
        config = {"model_type": "bert", **sizes, "intermediate_size": 16, "max_position_embeddings": 24}
        config["architectures"] = [f"BertFor{kind}Classification"]
        found = pf.Model.from_config(config).classify([[2, 7, 3], [2, 3]])
        table = arrow.table(found)
        assert table["labels"].to_pylist() == found.labels
        assert table["scores"].to_pylist() == [s.tolist() for s in found.scores]


def test_arrow_columns_are_texts_and_batches_of_ids_are_arrow_arrays(run: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    model = pf.load(run)
    texts = ["Good night", "Enter", "Enter three witches"]
    want = model.score(texts).log_likelihood
    for column in (arrow.array(texts), arrow.chunked_array([texts[:1], texts[1:]])):
        np.testing.assert_array_equal(model.score(column).log_likelihood, want)
    batch = model.require_tokenizer().encode_batch(texts)
    array = arrow.array(batch)
    assert array.to_pylist() == [batch[i].tolist() for i in range(3)]
    assert array.values.buffers()[1].address == batch.ids.ctypes.data


def test_missing_texts_are_refused(run: Path) -> None:
    with pytest.raises(InputError, match="text 1 is None; give strings"):
        pf.load(run).score(["a", None])  # type: ignore[list-item]
