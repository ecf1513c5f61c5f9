"""``pyrformer tokenizer``, run as users run it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pyrformer as pf

COMMAND = shutil.which("pyrformer", path=Path(sys.executable).parent) or shutil.which("pyrformer")
pytestmark = pytest.mark.skipif(COMMAND is None, reason="the pyrformer command is not installed")

TEXT = "the cat sat on the mat, and the dog lay by the door. " * 20


def run(*args: object, code: int = 0, stdin: str | None = None) -> str:
    """Standard output; where it should fail, the line on standard error."""
    assert COMMAND is not None
    done = subprocess.run(
        [COMMAND, "tokenizer", *map(str, args)],
        capture_output=True,
        encoding="utf-8",
        input=stdin,
        timeout=120,
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr if code else done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    lines = [
        {"lang": lang, "text": text} for lang, text in [("en", TEXT), ("fr", "le chat ☃"), ("en", "a cat")]
    ]
    (folder / "all.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    for preset, size in [("gpt2", 300), ("bert-uncased", 60)]:
        out = run(
            "train",
            folder / "text.txt",
            "--preset",
            preset,
            "--vocab-size",
            size,
            "--out",
            folder / f"{preset}.json",
        )
        assert f"{preset}.json" in out
    return folder


def test_train_reports(folder: Path) -> None:
    made = json.loads(
        run("train", folder / "text.txt", "--kind", "char", "--out", folder / "c.json", "--json")
    )
    assert (made["kind"], made["vocab_size"]) == ("char", len(set(TEXT)))
    assert pf.Tokenizer.load(folder / "c.json").vocab_size == made["vocab_size"]
    assert "syllables" in run("train", folder / "text.txt", "--kind", "syllables", "--out", "x", code=2)
    assert "nowhere.txt" in run("train", folder / "nowhere.txt", "--out", folder / "x.json", code=2)
    assert "no folder" in run("train", folder / "text.txt", "--out", folder / "no" / "x.json", code=2)


def test_there_and_back(folder: Path) -> None:
    tokenizer = folder / "gpt2.json"
    ids = run("encode", tokenizer, "the cat ☃")
    assert ids.split() == [str(i) for i in pf.Tokenizer.load(tokenizer).encode("the cat ☃").ids]
    assert run("decode", tokenizer, *ids.split()) == "the cat ☃\n"
    assert run("decode", tokenizer, "-", stdin=ids) == "the cat ☃\n"
    assert run("encode", tokenizer, "-", stdin="the cat ☃") == ids
    full = json.loads(run("encode", folder / "bert-uncased.json", "the cat", "--json"))
    assert full["tokens"][0] == "[CLS]"
    assert full["offsets"][1] == [0, 3]
    assert (
        run("encode", folder / "bert-uncased.json", "the cat", "--no-special", "--tokens").split()[0] == "the"
    )
    assert "'x'" in run("decode", tokenizer, "1", "x", code=2)
    assert "99999" in run("decode", tokenizer, "99999", code=2)
    assert "nowhere" in run("encode", folder / "nowhere.json", "a", code=2)


def test_info(folder: Path) -> None:
    said = json.loads(run("info", folder / "bert-uncased.json", "--json"))
    assert said["kind"] == "wordpiece"
    assert "[MASK]" in said["special_tokens"].values()
    assert "[MASK]" in run("info", folder / "bert-uncased.json")


def test_compare(folder: Path) -> None:
    both = [folder / "gpt2.json", folder / "bert-uncased.json"]
    rows = json.loads(run("compare", *both, "--text", folder / "all.jsonl", "--by", "lang", "--json"))
    assert [(r["text"], r["unknown_rate"] > 0) for r in rows] == [
        ("en", False),
        ("fr", False),
        ("en", False),
        ("fr", True),
    ]
    assert rows[0]["bytes_per_token"] == pytest.approx(rows[0]["bytes"] / rows[0]["tokens"], abs=1e-4)
    table = run("compare", *both, "--text", folder / "text.txt")
    assert "bytes/token" in table
    # Names are as short as they can be.
    assert "gpt2.json" in table
    assert str(folder) not in table
