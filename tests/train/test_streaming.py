"""Training begins before all text is tokenized, and the bits are those of text that was tokenized before."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from recipes import GPT2

import pyrformer as pf
from pyrformer.data.prepared import Preparation
from pyrformer.errors import DataError

#: Characters of a shard here; steps that two of them settle: 2^18 tokens in rows of 64, 128 rows a step.
SHARD = 1 << 18
FIRST = (1 << 18) // (64 * 128)
WORDS = ["to", "be", "or", "not", "that", "is", "the", "question", "whether", "nobler"]


def texts(count: int) -> list[str]:
    draw = random.Random(count)
    return [" ".join(draw.choices(WORDS, k=100)) for _ in range(count)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five shards of characters."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    rows = [json.dumps({"text": text}) + "\n" for text in texts(3000)]
    path.write_text("".join(rows), encoding="utf-8")
    pf.Tokenizer.train(iter(texts(20)), "char").save(path.with_name("tokenizer.json"))
    return path


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyrformer.data.documents.CHUNK", SHARD)
    monkeypatch.setattr("pyrformer.training.source.SHARD_TOKENS", SHARD - 1000)


def options(source: Path, out: Path, **more: Any) -> dict[str, Any]:
    small = {"seq_len": 64, "batch_size": 128, "max_steps": 3, "warmup_steps": 1, "log_every": 1, "seed": 3}
    model = {**GPT2, "n_positions": 64, "n_embd": 4, "n_head": 1}
    tokenizer = {"path": str(source.with_name("tokenizer.json"))}
    given = {"files": [str(source)], "out": str(out), "model": model, "tokenizer": tokenizer}
    return {**given, **small, **more}


def rows(run: Path) -> list[dict[str, Any]]:
    known = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [{name: row[name] for name in ("step", "loss", "valid_loss") if name in row} for row in known]


def weights(run: Path) -> bytes:
    return (run / "model.safetensors").read_bytes()


@pytest.mark.parametrize("objective", ["ar", "mlm"])
def test_the_first_steps_come_before_the_rest_of_the_text(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: str
) -> None:
    """The thread stops behind two shards until step 3 was made; the bits are those of a prepared folder."""
    go_on, seen = threading.Event(), []
    add = Preparation.add

    def slow(self: Preparation, *arguments: Any) -> None:
        add(self, *arguments)
        if self.folder.name != "prepared" and len(self.manifest["shards"]) == 2:
            assert go_on.wait(60)

    monkeypatch.setattr(Preparation, "add", slow)

    def event(kind: str, numbers: dict[str, Any]) -> None:
        if kind == "step" and numbers["step"] == 3:
            manifest = json.loads((tmp_path / "run" / "tokens" / "manifest.json").read_text("utf-8"))
            seen.append((manifest["complete"], len(manifest["shards"])))
            go_on.set()

    more: dict[str, Any] = {"max_steps": 6, "objective": objective}
    tokenizer = source.with_name("tokenizer.json")
    if objective == "mlm":
        tokenizer = tmp_path / "masked.json"
        alphabet = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
        names = [*alphabet, *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz")]
        (tmp_path / "vocab.txt").write_text("\n".join(names))
        pf.Tokenizer.load(tmp_path / "vocab.txt").save(tokenizer)
        small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        more["model"] = {"model_type": "bert", **small, "max_position_embeddings": 64}
        more["tokenizer"] = {"path": str(tokenizer)}
    run = pf.train(pf.TrainConfig(**options(source, tmp_path / "run", **more)), event)
    assert seen == [(False, 2)]
    loaded = pf.Tokenizer.load(tokenizer)
    pf.prepare(str(source), tmp_path / "prepared", loaded, objective=objective, shard_tokens=SHARD - 1000)
    more = {**more, "files": [str(tmp_path / "prepared")], "tokenizer": {}}
    again = pf.train(pf.TrainConfig(**options(source, tmp_path / "again", **more)))
    assert rows(run.folder) == rows(again.folder)
    assert weights(run.folder) == weights(again.folder)
    assert (run.folder / "tokens" / "shard-00002.safetensors").exists()
    data = json.loads((run.folder / "training.json").read_text("utf-8"))["data"]
    assert (
        data["train_tokens"] + data["valid_tokens"] == pf.Prepared.open(run.folder / "tokens").corpus.tokens
    )


def test_waiting_is_measured_and_ends_at_the_end_of_the_text(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step behind two shards is asked for while the thread is at the third one."""
    add, waits, go_on = Preparation.add, [], threading.Event()

    def slow(self: Preparation, *arguments: Any) -> None:
        if len(self.manifest["shards"]) == 2:
            assert go_on.wait(60)
            time.sleep(0.3)
        add(self, *arguments)

    def event(kind: str, numbers: dict[str, Any]) -> None:
        if kind == "step":
            waits.append(numbers["loader_wait_seconds"])
            if len(waits) == FIRST:
                go_on.set()

    monkeypatch.setattr(Preparation, "add", slow)
    pf.train(pf.TrainConfig(**options(source, tmp_path / "run", max_steps=FIRST + 2)), event)
    assert waits[FIRST] > 0.2 > max(waits[:FIRST])


def test_a_resumed_run_is_a_straight_one(source: Path, tmp_path: Path) -> None:
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    pf.train(pf.TrainConfig(**options(source, straight, max_steps=FIRST + 3)))
    given = options(source, parts, max_steps=FIRST + 3)

    def stop(kind: str, numbers: dict[str, Any]) -> None:
        if kind == "step" and numbers["step"] == FIRST + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pf.train(pf.TrainConfig(**given), stop)
    # As a process that was killed leaves it: a shard short, and the manifest behind.
    manifest = json.loads((parts / "tokens" / "manifest.json").read_text("utf-8"))
    manifest["shards"] = manifest["shards"][:1]
    for name in ("documents", "tokens", "rejected", "cleaning", "text_sha256"):
        manifest.pop(name, None)
    (parts / "tokens" / "manifest.json").write_text(json.dumps({**manifest, "complete": False}))
    pf.train(pf.TrainConfig(**given, resume=True))
    assert weights(parts) == weights(straight)
    assert rows(parts) == rows(straight)
    # Without the tokens, too.
    for file in (parts / "tokens").iterdir():
        file.unlink()
    pf.train(pf.TrainConfig(**{**given, "max_steps": FIRST + 4}, resume=True))
    assert pf.Prepared.open(parts / "tokens", verify=True).manifest["complete"]


def test_an_error_behind_the_first_shards_ends_the_run(source: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(source.read_bytes() + b'{"text": "cut\n')
    more = {"files": [str(bad)], "max_steps": 100_000}
    with pytest.raises(DataError, match=r"bad\.jsonl:3001 is not valid JSON"):
        pf.train(pf.TrainConfig(**options(source, tmp_path / "run", **more)))
    assert not list(tmp_path.glob(".run*"))


def test_a_file_that_vanishes_ends_the_run(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = tmp_path / "second.jsonl"
    second.write_bytes(source.read_bytes())
    add = Preparation.add

    def vanish(self: Preparation, *arguments: Any) -> None:
        second.unlink(missing_ok=True)
        add(self, *arguments)

    monkeypatch.setattr(Preparation, "add", vanish)
    more = {"files": [str(source), str(second)], "max_steps": 100_000}
    with pytest.raises(DataError, match=r"second\.jsonl does not exist"):
        pf.train(pf.TrainConfig(**options(source, tmp_path / "run", **more)))


def test_a_thread_that_fails_is_an_error(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "disk"))

    monkeypatch.setattr(Preparation, "add", full)
    with pytest.raises(pf.Error, match="No space left"):
        pf.train(pf.TrainConfig(**options(source, tmp_path / "run")))
    assert not list(tmp_path.glob("*run*"))


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_signal_ends_the_wait_for_text(source: Path, tmp_path: Path) -> None:
    """Standard input that stays open: the first window is trained, the second one is waited for."""
    whole = source.read_bytes()
    given = {**options(source, tmp_path / "run", max_steps=FIRST + 2), "files": ["-"]}
    code = (
        "import json, sys, pyrformer as pf, pyrformer.data.documents, pyrformer.training.source as source\n"
        f"pyrformer.data.documents.CHUNK, source.SHARD_TOKENS = {SHARD}, {SHARD - 1000}\n"
        "try: pf.train(pf.TrainConfig(**json.loads(sys.argv[1])))\n"
        "except pf.errors.Stopped as e: sys.exit(128 + e.signal)\n"
    )
    command = [sys.executable, "-c", code, json.dumps(given)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    assert process.stdin is not None
    try:
        # Two shards of five, and a bit.
        process.stdin.write(whole[: len(whole) // 2])
        process.stdin.flush()
        deadline = time.monotonic() + 60
        while not (tmp_path / "run" / "metrics.jsonl").exists() or len(rows(tmp_path / "run")) < FIRST - 8:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.5)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(timeout=20) == 143
    finally:
        process.kill()
        process.wait()
        with suppress(BrokenPipeError):
            process.stdin.close()
    assert rows(tmp_path / "run")[-1]["step"] < FIRST + 2
    again = subprocess.run(
        [*command[:-1], json.dumps({**given, "resume": True})],
        input=whole,
        env=environment,
    )
    assert again.returncode == 0
    straight = pf.train(pf.TrainConfig(**options(source, tmp_path / "straight", max_steps=FIRST + 2)))
    assert weights(tmp_path / "run") == weights(straight.folder)
    assert rows(tmp_path / "run") == rows(straight.folder)
