"""Files through a model: rows in, rows with results out, whatever the form, the batch, or the moment of a kill."""

from __future__ import annotations

import datetime
import decimal
import gzip
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import pyrformer as pf
from pyrformer._core import zstd_frame
from pyrformer.cli import main
from pyrformer.errors import DataError, FileError, InputError
from pyrformer.pipeline import STRETCH, run

CONFIG = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
TEXTS = ["the cat sat", "on the mat the king slept", "a cat", "the mat on the mat"]
ROWS = [{"id": i, "text": TEXTS[i % 4] + " again" * (i % 5)} for i in range(2 * STRETCH + 7)]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = pf.Tokenizer.train(iter(TEXTS * 9), kind="bpe", vocab_size=280)
    folder = tmp_path_factory.mktemp("files") / "run"
    pf.Model.from_config({**CONFIG, "vocab_size": tokenizer.vocab_size}, seed=1, tokenizer=tokenizer).save(
        folder
    )
    return folder


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def lengths(texts: list[str]) -> list[dict[str, Any]]:
    if "" in texts:
        raise InputError("[test] an empty text")
    return [{"length": len(text)} for text in texts]


def read(path: Path) -> list[dict[str, Any]]:
    return list(pf.Documents([path]).rows())


def invoke(*args: str | Path, code: int = 0, **options: Any) -> Any:
    result = CliRunner().invoke(main, [str(a) for a in args], **options)
    assert result.exit_code == code, result.output
    return result


def test_every_source_gives_the_same_rows(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pyarrow.parquet

    rows = [{"id": str(i), "text": text} for i, text in enumerate(TEXTS)]
    content = lines(rows)
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(content))
    (tmp_path / "c.jsonl.zst").write_bytes(zstd_frame(content))
    table = "\n".join(f"{row['id']},{row['text']}" for row in rows)
    (tmp_path / "d.csv").write_text("id,text\n" + table)
    (tmp_path / "e.tsv").write_text("id\ttext\n" + table.replace(",", "\t"))
    pyarrow.parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "f.parquet")
    (tmp_path / "g.txt").write_text("\n\n".join(TEXTS))
    want = [{**row, "length": len(row["text"])} for row in rows]
    for source in sorted(tmp_path.iterdir()):
        out: list[str] = []
        run(source, lengths, out.append)
        found = [json.loads(line) for line in "".join(out).splitlines()]
        expected = want if source.suffix != ".txt" else [{k: r[k] for k in ("text", "length")} for r in want]
        assert found == expected, source
    # The folder and a pattern stand for their files.
    for many, count in ((tmp_path, 7), (tmp_path / "*.jsonl*", 3)):
        assert run(many, lengths, lambda _: None).rows == count * len(TEXTS)


def test_every_ending_holds_the_same_rows(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    # A field that is missing, of mixed numbers, or without values at first.
    rows = [
        {**row, **({"more": 1 if i < STRETCH else 0.5} if i % 2 else {}), "late": None if i < 600 else "x"}
        for i, row in enumerate(ROWS)
    ]
    (tmp_path / "in.jsonl").write_bytes(lines(rows))
    want = [{**row, "length": len(str(row["text"]))} for row in rows]
    for name in ("out.jsonl", "out.jsonl.gz", "out.jsonl.zst", "out.parquet"):
        counts = run(tmp_path / "in.jsonl", lengths, tmp_path / name)
        assert counts.rows == len(rows)
        found = read(tmp_path / name)
        if name.endswith("parquet"):
            assert found == [{"more": None, **row} for row in want]
        else:
            assert found == want
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


KILLED = """
import os, signal, sys
from pyrformer.pipeline import run
left = int(sys.argv[3])
def verb(texts):
    global left
    if texts:
        left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    if "" in texts:
        from pyrformer.errors import InputError
        raise InputError("[test] an empty text")
    return [{"length": len(text)} for text in texts]
run(sys.argv[1], verb, sys.argv[2], on_corrupt="quarantine")
"""


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path, ending: str) -> None:
    if ending == ".parquet":
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    bad = [b"no json\n" if i % 300 == 7 else lines([row]) for i, row in enumerate(ROWS)]
    bad[3] = bad[-2] = b'{"text": ""}\n'
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"".join(bad))
    straight = tmp_path / ("straight" + ending)
    counts = run(source, lengths, straight, on_corrupt="quarantine")
    assert (counts.unread, counts.refused) == (4, 2)
    # Killed in the third stretch: the first, with a text that is refused, takes 513 calls. What was half written is
    # cut off.
    again = tmp_path / ("again" + ending)
    child = subprocess.run([sys.executable, "-c", KILLED, str(source), str(again), "514"], check=False)
    assert child.returncode == -9
    assert not again.exists()
    for name in (f".{again.name}.partial", f".{again.name}.quarantine.partial"):
        with (tmp_path / name).open("ab") as file:
            file.write(b"torn")
    calls: list[int] = []

    def watched(texts: list[str]) -> list[dict[str, Any]]:
        calls.append(len(texts))
        return lengths(texts)

    assert run(source, watched, again, on_corrupt="quarantine") == counts
    assert max(calls) <= STRETCH
    assert sum(calls) < len(ROWS)
    assert again.read_bytes() == straight.read_bytes()
    aside = [p.with_name(p.name + ".quarantine.jsonl").read_bytes() for p in (again, straight)]
    assert aside[0] == aside[1]
    assert len(aside[0].splitlines()) == 6
    assert not list(tmp_path.glob(".*"))


def test_types_of_parquet_pass_unchanged(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")

    day = datetime.datetime(2024, 2, 29, 12, 30, 1, 5)
    columns = {
        "text": arrow.array(["a", "bb", "ccc"]),
        "small": arrow.array([1, None, 3], arrow.int16()),
        "float": arrow.array([1.5, float("nan"), float("inf")], arrow.float32()),
        "bytes": arrow.array([b"\xff\x00", b"", None]),
        "date": arrow.array([day.date(), None, day.date()]),
        "time": arrow.array([day.time(), day.time(), None]),
        "when": arrow.array([day, None, day], arrow.timestamp("us", "UTC")),
        "milli": arrow.array([day.replace(microsecond=5000)] * 3, arrow.timestamp("ms")),
        "span": arrow.array([datetime.timedelta(days=-1, microseconds=7)] * 3, arrow.duration("us")),
        "price": arrow.array(
            [decimal.Decimal("1.20"), None, decimal.Decimal("-7.05")], arrow.decimal128(9, 2)
        ),
        "kind": arrow.array(["x", "y", "x"]).dictionary_encode(),
        "nested": arrow.array([{"at": day, "ids": [1]}, None, {"at": None, "ids": []}]),
        "nothing": arrow.array([None, None, None], arrow.int32()),
    }
    table = arrow.table(columns)
    arrow.parquet.write_table(table, tmp_path / "in.parquet")
    stored = arrow.parquet.read_table(tmp_path / "in.parquet")
    run(tmp_path / "in.parquet", lengths, tmp_path / "out.parquet")
    out = arrow.parquet.read_table(tmp_path / "out.parquet")
    assert out.column_names == [*table.column_names, "length"]
    assert out.drop(["length"]).schema.types == stored.schema.types
    for name in set(table.column_names) - {"float"}:
        assert out[name].to_pylist() == stored[name].to_pylist(), name
    assert out["length"].to_pylist() == [1, 2, 3]
    np.testing.assert_array_equal(out["float"].to_pylist(), stored["float"].to_pylist())
    # Beside rows of another kind, the types that fit all.
    (tmp_path / "more.jsonl").write_text('{"text": "d", "small": "many"}\n')
    run([tmp_path / "in.parquet", tmp_path / "more.jsonl"], lengths, tmp_path / "mixed.jsonl")
    assert json.loads((tmp_path / "mixed.jsonl").read_text().splitlines()[0])["date"] == "2024-02-29"


def test_leftovers_of_a_kill_go_away(tmp_path: Path) -> None:
    left = tmp_path / "..out.jsonl.state.json.123-0-abc.partial"
    other = tmp_path / "..other.jsonl.state.json.123-0-abc.partial"
    for path in (left, other):
        path.touch()
    run(iter_file(tmp_path), lengths, tmp_path / "out.jsonl")
    assert not left.exists()
    assert other.exists()


def iter_file(folder: Path) -> Path:
    path = folder / "in.jsonl"
    path.write_bytes(lines(ROWS[:5]))
    return path


def test_masks_of_files_are_filled(tmp_path: Path) -> None:
    tokenizer = pf.Tokenizer.train(iter(TEXTS * 9), preset="bert-uncased", vocab_size=80)
    config = {
        "model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 32, "max_position_embeddings": 32, "vocab_size": tokenizer.vocab_size,
    }  # fmt: skip
    model = pf.Model.from_config(config, seed=1, tokenizer=tokenizer)
    model.save(tmp_path / "masked")
    texts = ["the [MASK] sat", "on the mat the [MASK] slept on the [MASK]", "[MASK]", "a [MASK] and a king"]
    alone = [model.fill_mask(text, 3) for text in texts]
    assert model.fill_mask(texts * 40, 3) == alone * 40
    source = tmp_path / "in.jsonl"
    source.write_bytes(lines([{"id": i, "text": text} for i, text in enumerate(texts)]))
    invoke("fill-mask", tmp_path / "masked", "--texts", source, "--top-k", 3, "--out", tmp_path / "out.jsonl")
    out = read(tmp_path / "out.jsonl")
    assert [row["id"] for row in out] == [0, 1, 2, 3]
    assert [[len(m) for m in row["masks"]] for row in out] == [[3], [3, 3], [3], [3]]
    assert out[1]["masks"][1][0]["sequence"] == alone[1][1][0].sequence
    source.write_bytes(lines([{"text": "no mask"}, {"text": texts[0]}]))
    left = invoke("fill-mask", tmp_path / "masked", "--texts", source, "--on-corrupt", "skip")
    assert "left out" in left.stderr
    assert len(left.stdout.splitlines()) == 1
    invoke("fill-mask", tmp_path / "masked", "a [MASK]", "--texts", source, code=2)
    invoke("fill-mask", tmp_path / "masked", code=2)


@pytest.mark.parametrize("masked", [False, True])
def test_a_long_text_is_scored_in_little_memory(model_folder: Path, masked: bool) -> None:
    if masked:
        tokenizer = pf.Tokenizer.train(iter(TEXTS * 9), preset="bert-uncased", vocab_size=80)
        config = {
            "model_type": "bert", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
            "intermediate_size": 8, "max_position_embeddings": 256, "vocab_size": tokenizer.vocab_size,
        }  # fmt: skip
        model = pf.Model.from_config(config, seed=1, tokenizer=tokenizer)
    else:
        model = pf.load(model_folder)
    told: list[int] = []
    text = "the cat sat on the mat " * (120 if masked else 4000)
    tracemalloc.start()
    scores = model.score([text], progress=told.append)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert told == sorted(told)
    assert len(told) > 10
    assert told[-1] == scores.tokens[0]
    # A row of each token at once would be 256 × 8 bytes a token.
    assert peak < scores.tokens[0] * 700 + 1_500_000


def test_what_was_begun_is_gone_on_with_by_the_same_only(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(lines(ROWS))

    def dies(texts: list[str]) -> list[dict[str, Any]]:
        if len(texts) < STRETCH and texts:
            raise MemoryError
        return lengths(texts)

    with pytest.raises(MemoryError):
        run(source, dies, out, identity={"by": 1})
    with pytest.raises(DataError, match="begun with other"):
        run(source, lengths, out, identity={"by": 2})
    assert run(source, lengths, out, identity={"by": 2}, overwrite=True).rows == len(ROWS)
    with pytest.raises(FileError, match="exists"):
        run(source, lengths, out)


def test_rows_that_are_refused_are_named_or_left_out(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(lines([{"text": "a"}, {"text": ""}, {"text": "b"}]))
    with pytest.raises(InputError, match="empty text; this is row 2"):
        run(source, lengths, tmp_path / "out.jsonl")
    counts = run(source, lengths, tmp_path / "skip.jsonl", on_corrupt="skip")
    assert (counts.rows, counts.refused) == (3, 1)
    assert [row["text"] for row in read(tmp_path / "skip.jsonl")] == ["a", "b"]
    with pytest.raises(DataError, match="'text' already"):
        run(source, lambda texts: [{"text": 1} for _ in texts], [].append)
    run(source, lambda texts: [{"text": 1} for _ in texts], [].append, prefix="new_")
    with pytest.raises(FileError, match=r"name it \.jsonl"):
        run(source, lengths, tmp_path / "out.csv")
    with pytest.raises(InputError, match="quarantine needs a file"):
        run(source, lengths, [].append, on_corrupt="quarantine")


def test_commands_add_what_the_model_says(model_folder: Path, tmp_path: Path) -> None:
    rows = ROWS[:9]
    (tmp_path / "in.jsonl").write_bytes(lines(rows))
    model = pf.load(model_folder)
    texts = [str(row["text"]) for row in rows]
    scores = model.score(texts)
    out = tmp_path / "out.jsonl.zst"
    invoke("score", model_folder, tmp_path / "in.jsonl", "--out", out, "--prefix", "lm_")
    found = read(out)
    assert [(r["id"], r["lm_tokens"]) for r in found] == [(i, int(n)) for i, n in enumerate(scores.tokens)]
    assert [r["lm_log_likelihood"] for r in found] == scores.log_likelihood.tolist()
    found = [json.loads(x) for x in invoke("embed", model_folder, tmp_path / "in.jsonl").stdout.splitlines()]
    assert [r["embedding"] for r in found] == [[round(x, 7) for x in v] for v in model.embed(texts).tolist()]
    # Standard input is the process's own.
    argv = [sys.executable, "-c", "from pyrformer.cli import main; main()", "tokenize", model_folder]
    printed = subprocess.run(argv, input=b"a cat\nthe mat\n", stdout=subprocess.PIPE, check=True).stdout
    found = [json.loads(x) for x in printed.splitlines()]
    tokenizer = model.require_tokenizer()
    assert found == [{"text": text, "input_ids": tokenizer.encode(text).ids} for text in ("a cat", "the mat")]
    # What is wrong is one line, exit code 2.
    result = invoke("score", model_folder, tmp_path / "none.jsonl", code=2)
    assert result.stderr.startswith("pyrformer: error: [data]")
    assert len(result.stderr.splitlines()) == 1
    invoke("score", model_folder, tmp_path / "in.jsonl", "--out", out, code=2)
    invoke("score", model_folder, tmp_path / "in.jsonl", "--out", out, "--overwrite")


def test_results_depend_on_the_text_alone(model_folder: Path, tmp_path: Path) -> None:
    many = ROWS[: STRETCH // 2]
    (tmp_path / "in.jsonl").write_bytes(lines(many))
    together = invoke("score", model_folder, tmp_path / "in.jsonl").stdout.splitlines()
    for at in (0, 17):
        (tmp_path / "one.jsonl").write_bytes(lines(many[at : at + 1]))
        assert invoke("score", model_folder, tmp_path / "one.jsonl").stdout.splitlines() == [together[at]]
