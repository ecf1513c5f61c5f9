"""Every kind of source gives the same documents, streamed; what is wrong with one is said in a line."""

from __future__ import annotations

import contextlib
import csv
import gzip
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyrformer.data.documents import Documents, read_documents
from pyrformer.errors import DataError, InputError

TEXTS = ["one", 'two, "quoted"\nand a line', "drei ü 東京", "", "a\tb"]


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(texts)).encode()


def write_csv(path: Path, texts: list[str], delimiter: str = ",") -> None:
    with path.open("w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f, delimiter=delimiter)
        writer.writerow(["id", "text"])
        writer.writerows(enumerate(texts))


def test_each_format_gives_the_same_documents(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(jsonl(TEXTS)))
    write_csv(tmp_path / "c.csv", TEXTS)
    write_csv(tmp_path / "d.tsv", TEXTS, "\t")
    for name in ("a.jsonl", "b.jsonl.gz", "c.csv", "d.tsv"):
        assert read_documents(tmp_path / name) == TEXTS, name
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "e.txt").write_text("last")
    (tmp_path / "sub" / "notes.md").write_text("not a source")
    assert read_documents([tmp_path]) == TEXTS * 4 + ["last"]
    assert read_documents([str(tmp_path / "**" / "*.txt"), str(tmp_path / "[ad].*")]) == [
        "last",
        *TEXTS,
        *TEXTS,
    ]


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1))
def test_tables_and_lines_come_back(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "a.jsonl").write_bytes(jsonl(texts))
    write_csv(folder / "a.csv", texts)
    for name in ("a.jsonl", "a.csv"):
        if any(texts):
            assert read_documents(folder / name) == texts
        else:
            with pytest.raises(DataError, match="holds no document"):
                read_documents(folder / name)


def test_iterables_are_read_no_further_than_asked() -> None:
    taken = itertools.count()
    endless = (f"text {next(taken)}" for _ in itertools.repeat(None))
    assert list(itertools.islice(Documents(endless), 3)) == ["text 0", "text 1", "text 2"]
    assert next(taken) < 1000
    with pytest.raises(InputError, match="strings, got a int"):
        list(Documents(iter(["a", 1])))


@pytest.mark.parametrize("columns", ["string", "large_string", "string_view"])
def test_arrow_and_parquet(tmp_path: Path, columns: str) -> None:
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pyarrow.parquet

    table = arrow.table({"id": range(len(TEXTS)), "text": arrow.array(TEXTS, getattr(arrow, columns)())})

    class Stream:
        def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
            return table.__arrow_c_stream__(requested_schema)

    assert read_documents(Stream()) == TEXTS
    with pytest.raises(DataError, match="no column 'body'; set column to one of id, text"):
        read_documents(Stream(), column="body")
    with pytest.raises(DataError, match="value of type int"):
        read_documents(Stream(), column="id")
    if columns != "string_view":
        path = tmp_path / "a.parquet"
        pyarrow.parquet.write_table(table, path)
        assert read_documents([path]) == TEXTS
        path.write_bytes(path.read_bytes()[:-7])
        with pytest.raises(DataError, match="not a whole parquet file"):
            read_documents([path])


def test_cleaning_is_counted() -> None:
    texts = ["e\u0301", "\u00e9", "a  b", "x\0y", "&lt;", "\ufb01"]
    steps = ["nfkc", "control", "whitespace", "html", "min-length=2", "duplicates"]
    documents = Documents(iter(texts * 2), clean=steps)
    assert list(documents) == ["a b", "xy", "fi"]
    rows = {
        r.step: (r.documents_changed, r.documents_dropped, r.characters_removed) for r in documents.report
    }
    assert rows == {
        "nfkc": (4, 0, 0),
        "control": (2, 0, 2),
        "whitespace": (2, 0, 2),
        "html": (2, 0, 6),
        "min-length=2": (0, 6, 6),
        "duplicates": (0, 3, 7),
    }
    with pytest.raises(DataError, match="no document is left"):
        read_documents(iter(["a"]), clean=["min-length=2"])


CODE = "import sys; from pyrformer.data.documents import read_documents; print(read_documents(['-']))"


@pytest.mark.parametrize(
    ("given", "expected"), [(jsonl(["a", "b"]), ["a", "b"]), ("né\nb".encode(), ["né\nb"])]
)
def test_standard_input(given: bytes, expected: list[str]) -> None:
    out = subprocess.run([sys.executable, "-c", CODE], input=given, capture_output=True, check=True)
    assert out.stdout.decode().strip() == repr(expected)


BROKEN = {
    "cut.jsonl.gz": gzip.compress(jsonl(TEXTS))[:-9],
    "not.txt.gz": b"plain text",
    "not.txt.zst": b"plain text",
    "open.csv": b'id,text\n1,"never closed\n2,x\n',
    "bare.csv": b'id,text\n1,a "b" c\n',
    "short.csv": b"id,text\n1\n",
    "none.csv": b"id,body\n1,x\n",
    "empty.csv": b"",
    "latin.csv": b"text\ncaf\xe9\n",
    "folder.doc": b"x",
}


@pytest.mark.parametrize("name", BROKEN)
def test_damaged_files_are_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(BROKEN[name])
    args = ["train", name, "--out", "run", "--tokenizer", "char", "--max-steps", "1"]
    code = "from pyrformer.cli import main; main(prog_name='pyrformer')"
    done = subprocess.run([sys.executable, "-c", code, *args], cwd=tmp_path, capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if line.startswith("pyrformer: error: [data] ")]
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1, done.stderr
    assert name in lines[0]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_garbled_files_never_panic(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    whole = gzip.compress(jsonl(TEXTS * 20))
    for i in range(60):
        damaged = bytearray(whole)
        for place in random.integers(0, len(whole), 3):
            damaged[place] ^= int(random.integers(1, 256))
        path = tmp_path / f"{i}.jsonl.gz"
        path.write_bytes(damaged)
        # A panic would be an error of another class.
        with contextlib.suppress(DataError):
            assert read_documents(path)


def test_nothing_found_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no file of"):
        read_documents(tmp_path)
    with pytest.raises(DataError, match="no file matches"):
        read_documents(str(tmp_path / "*.txt"))


def test_texts_in_place_of_paths_are_told_apart() -> None:
    with pytest.raises(DataError, match=r"It was a bright.*is no path .*iter\(texts\)"):
        list(Documents(["It was a bright cold day in April. " * 20]))
