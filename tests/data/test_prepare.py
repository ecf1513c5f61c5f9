"""Prepared folders: the same ids as without them, whatever kills the work, and training from them."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pyrformer as pf
from pyrformer.data.documents import tokenize
from pyrformer.errors import ConfigError, DataError, FileError, InputError

WORDS = ["to", "be", "or", "not", "that", "is", "the", "question", "whether", "nobler"]


def texts(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 40))) for _ in range(count)]


@pytest.fixture(scope="module")
def tokenizer() -> pf.Tokenizer:
    return pf.Tokenizer.train(iter(texts(300)), "bpe", 300)


def write_jsonl(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in documents))
    return path


def ids_of(prepared: pf.Prepared) -> list[list[int]]:
    return [prepared.corpus.document(i).tolist() for i in range(prepared.corpus.documents)]


@pytest.mark.parametrize("objective", ["ar", "mlm"])
def test_a_prepared_folder_holds_what_tokenizing_gives(
    tmp_path: Path, tokenizer: pf.Tokenizer, objective: str
) -> None:
    documents = texts(500)
    pf.prepare(iter(documents), tmp_path / "out", tokenizer, objective=objective, shard_tokens=2000)
    prepared = pf.Prepared.open(tmp_path / "out", verify=True)
    expected = tokenize(tokenizer, documents, objective=objective)
    assert len(prepared.manifest["shards"]) > 1
    assert ids_of(prepared) == [expected[i].tolist() for i in range(len(expected))]
    assert prepared.corpus.tokens == prepared.manifest["tokens"] == len(expected.ids)
    assert prepared.tokenizer.to_json() == tokenizer.to_json()


def test_a_shard_opens_with_safetensors(tmp_path: Path, tokenizer: pf.Tokenizer) -> None:
    numpy_files = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    documents = texts(20)
    pf.prepare(iter(documents), tmp_path / "out", tokenizer)
    shard = numpy_files.load_file(tmp_path / "out" / "shard-00000.safetensors")
    expected = tokenize(tokenizer, documents, objective="ar")
    assert shard["ids"].dtype == np.uint16
    np.testing.assert_array_equal(shard["ids"], expected.ids)
    np.testing.assert_array_equal(shard["offsets"], expected.offsets)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(max_size=30), min_size=1, max_size=40), st.integers(1, 200), st.integers(1, 4))
def test_threads_and_shards_change_no_id(
    tmp_path_factory: pytest.TempPathFactory, documents: list[str], shard: int, threads: int
) -> None:
    tokenizer = pf.Tokenizer.train(iter(texts(50)), "bpe", 280)
    out = tmp_path_factory.mktemp("prepared") / "out"
    if not any(documents):
        return
    pf.prepare(iter(documents), out, tokenizer, shard_tokens=shard, threads=threads)
    expected = tokenize(tokenizer, documents, objective="ar")
    assert ids_of(pf.Prepared.open(out)) == [expected[i].tolist() for i in range(len(documents))]


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path, tokenizer: pf.Tokenizer) -> None:
    documents = texts(30_000, seed=1)
    documents[7:7] = ["twice", "twice"]
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    with source.open("a") as file:
        file.write("no json\n")
    tokenizer.save(tmp_path / "tokenizer.json")
    options = ["--shard-tokens", "100000", "--clean", "duplicates", "--on-corrupt", "quarantine"]

    def start(out: Path) -> subprocess.Popen[bytes]:
        command = [
            str(Path(sys.executable).with_name("pyrformer")),
            "prepare",
            str(source),
            "--out",
            str(out),
        ]
        return subprocess.Popen(
            [*command, "--tokenizer", str(tmp_path / "tokenizer.json"), *options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    assert start(tmp_path / "whole").wait() == 0
    expected = folder_bytes(tmp_path / "whole")
    assert "no json" in expected["quarantine.jsonl"].decode()
    manifest = json.loads(expected["manifest.json"])
    assert (manifest["rejected"], manifest["cleaning"][0]["documents_dropped"] > 0) == (1, True)

    out, killed, draw = tmp_path / "killed", 0, random.Random(5)
    for _ in range(12):
        process = start(out)
        try:
            assert process.wait(timeout=draw.uniform(0.1, 0.8)) == 0
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            killed += 1
    assert start(out).wait() == 0
    assert killed > 0
    assert folder_bytes(out) == expected


def test_what_a_killed_run_was_writing_goes_away(tmp_path: Path, tokenizer: pf.Tokenizer) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", texts(50))
    pf.prepare(str(source), tmp_path / "whole", tokenizer)
    expected = folder_bytes(tmp_path / "whole")
    out = tmp_path / "out"
    out.mkdir()
    (out / ".manifest.json.71-0-1a.partial").write_text("{")
    pf.prepare(str(source), out, tokenizer)
    assert folder_bytes(out) == expected
    # Killed in the middle: no tokenizer yet, and a shard half written.
    manifest = json.loads(expected["manifest.json"])
    for name in ("documents", "tokens", "rejected", "cleaning", "text_sha256"):
        del manifest[name]
    (out / "manifest.json").write_text(json.dumps({**manifest, "complete": False, "shards": []}))
    (out / "tokenizer.json").unlink()
    (out / ".shard-00000.safetensors.71-1-1a.partial").write_bytes(b"half")
    pf.prepare(str(source), out, tokenizer)
    assert folder_bytes(out) == expected


def test_a_damaged_shard_is_made_again_or_named(tmp_path: Path, tokenizer: pf.Tokenizer) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", texts(30_000))
    out = tmp_path / "out"
    pf.prepare(str(source), out, tokenizer, shard_tokens=100_000)
    expected = folder_bytes(out)
    shard = out / "shard-00001.safetensors"
    garbled = bytearray(expected[shard.name])
    garbled[-5] ^= 1
    shard.write_bytes(garbled)
    pf.Prepared.open(out)
    with pytest.raises(DataError, match="shard-00001"):
        pf.Prepared.open(out, verify=True)
    shard.write_bytes(garbled[:-3])
    with pytest.raises(DataError, match="bytes instead of"):
        pf.Prepared.open(out)
    # Unfinished and damaged: made again from there.
    manifest = json.loads(expected["manifest.json"])
    for name in ("documents", "tokens", "rejected", "cleaning", "text_sha256"):
        del manifest[name]
    (out / "manifest.json").write_text(json.dumps({**manifest, "complete": False}))
    with pytest.raises(DataError, match="not complete"):
        pf.Prepared.open(out)
    pf.prepare(str(source), out, tokenizer, shard_tokens=100_000)
    assert folder_bytes(out) == expected


def test_what_is_corrupt_stops_is_left_out_or_kept_aside(tmp_path: Path, tokenizer: pf.Tokenizer) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text":"one"}\n{"text":2}\nno\n\xff\n{"text":"two"}\n')
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text":"x"}\n' * 9000)[:-20])
    (tmp_path / "c.csv").write_text("body\nx\n")
    sources = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl.gz", "c.csv")]
    with pytest.raises(DataError, match=r"a\.jsonl:2 holds a number"):
        pf.prepare(sources, tmp_path / "fail", tokenizer)
    manifest = pf.prepare(sources, tmp_path / "skip", tokenizer, on_corrupt="skip")
    assert manifest["rejected"] == 5
    assert not (tmp_path / "skip" / "quarantine.jsonl").exists()
    pf.prepare(sources, tmp_path / "aside", tokenizer, on_corrupt="quarantine")
    aside = [json.loads(line) for line in (tmp_path / "aside" / "quarantine.jsonl").read_text().splitlines()]
    assert [row["text"] for row in aside] == ['{"text":2}\n', "no\n", "\ufffd\n", "", ""]
    assert [name in row["reason"] for name, row in zip("aaabc", aside, strict=True)] == [True] * 5
    documents = ids_of(pf.Prepared.open(tmp_path / "aside"))
    assert documents[:2] == [tokenize(tokenizer, [t], objective="ar").ids.tolist() for t in ("one", "two")]


def test_other_text_options_or_folders_are_refused(tmp_path: Path, tokenizer: pf.Tokenizer) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", texts(10))
    out = tmp_path / "out"
    pf.prepare(str(source), out, tokenizer)
    assert pf.prepare(str(source), out, tokenizer)["complete"]
    with pytest.raises(DataError, match="other options"):
        pf.prepare(str(source), out, tokenizer, clean=["nfc"])
    with pytest.raises(DataError, match="another tokenizer"):
        pf.prepare(str(source), out, pf.Tokenizer.train(iter(texts(9)), "char"))
    write_jsonl(source, texts(11))
    with pytest.raises(DataError, match="another text"):
        pf.prepare(str(source), out, tokenizer)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    with pytest.raises(DataError, match="something else"):
        pf.prepare(str(source), tmp_path / "full", tokenizer)
    with pytest.raises(InputError, match="on_corrupt"):
        pf.prepare(str(source), tmp_path / "new", tokenizer, on_corrupt="ignore")
    with pytest.raises(DataError, match="no document is left"):
        pf.prepare(iter([]), tmp_path / "none", tokenizer)


def test_the_token_that_ends_a_text_stays_known(tmp_path: Path) -> None:
    roles = tmp_path / "roles"
    roles.mkdir()
    trained = pf.Tokenizer.train(iter(texts(20)), "bpe", 270, special_tokens=["<pad>", "<end>"])
    trained.save(roles / "tokenizer.json")
    (roles / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    tokenizer = pf.Tokenizer.load(roles)
    assert tokenizer.eos_token_id == 1
    pf.prepare(iter(texts(3)), tmp_path / "out", tokenizer)
    prepared = pf.Prepared.open(tmp_path / "out")
    assert prepared.tokenizer.eos_token_id == 1
    assert {ids[-1] for ids in ids_of(prepared)} == {1}
    with pytest.raises(DataError, match="another tokenizer"):
        pf.prepare(iter(texts(3)), tmp_path / "out", trained)


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path, tokenizer: pf.Tokenizer) -> None:
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(FileError, match="file"):
            pf.prepare(iter(texts(3)), out, tokenizer)
    pf.prepare(iter(texts(3)), tmp_path / "out", tokenizer)
    (tmp_path / "out" / "tokenizer.json").unlink()
    with pytest.raises(FileError, match=r"tokenizer\.json"):
        pf.Prepared.open(tmp_path / "out")


SMALL = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 32}


def test_training_from_a_prepared_folder_equals_training_from_text(tmp_path: Path) -> None:
    train, valid = (
        write_jsonl(tmp_path / "t.jsonl", texts(200)),
        write_jsonl(tmp_path / "v.jsonl", texts(30, 1)),
    )
    options = {"batch_size": 4, "max_steps": 6, "warmup_steps": 2, "model": SMALL, "log_every": 1}
    first = pf.train(
        pf.TrainConfig(
            files=[str(train)],
            valid=[str(valid)],
            out=str(tmp_path / "text"),
            tokenizer={"kind": "bpe", "vocab_size": 300},
            **options,
        )
    )
    tokenizer = pf.Tokenizer.load(tmp_path / "text")
    for name, path in (("train", train), ("valid", valid)):
        pf.prepare(str(path), tmp_path / name, tokenizer, shard_tokens=900)
    second = pf.train(
        pf.TrainConfig(
            files=[str(tmp_path / "train")],
            valid=[str(tmp_path / "valid")],
            out=str(tmp_path / "run"),
            **options,
        )
    )
    assert (second.train_loss, second.valid_loss) == (first.train_loss, first.valid_loss)
    weights = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("text", "run")]
    assert weights[0] == weights[1]


def test_without_a_held_out_folder_a_share_is_held_out(tmp_path: Path, tokenizer: pf.Tokenizer) -> None:
    pf.prepare(iter(texts(300)), tmp_path / "p", tokenizer, shard_tokens=1500)
    head, tail = pf.Prepared.open(tmp_path / "p").corpus.split(0.1)
    whole = pf.Prepared.open(tmp_path / "p").corpus
    assert head.tokens + tail.tokens == whole.tokens
    assert head.documents + tail.documents == whole.documents
    run = pf.train(
        pf.TrainConfig(files=[str(tmp_path / "p")], out=str(tmp_path / "run"), max_steps=2, model=SMALL)
    )
    assert np.isfinite(run.valid_loss)


def test_a_folder_for_another_purpose_is_named(tmp_path: Path, tokenizer: pf.Tokenizer) -> None:
    pf.prepare(iter(texts(50)), tmp_path / "p", tokenizer, objective="mlm")

    def start(**options: object) -> None:
        config = {
            "files": [str(tmp_path / "p")],
            "out": str(tmp_path / "run"),
            "max_steps": 1,
            "model": SMALL,
        }
        pf.train(pf.TrainConfig(**{**config, **options}))  # type: ignore[arg-type]

    with pytest.raises(ConfigError, match="--objective ar"):
        start()
    with pytest.raises(ConfigError, match="leave out the tokenizer"):
        start(objective="mlm", model={}, tokenizer={"kind": "char"})
    other = pf.Tokenizer.train(iter(texts(9)), "char")
    other.save(tmp_path / "tokenizer.json")
    with pytest.raises(ConfigError, match="another tokenizer"):
        start(objective="mlm", model={}, tokenizer={"path": str(tmp_path / "tokenizer.json")})
    assert not (tmp_path / "run").exists()
