"""Preparing by Ray: the folder of one machine to the byte, whatever happens to workers."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pyrformer as pf
from pyrformer.errors import InputError

WORDS = ["to", "be", "or", "not", "that", "is", "the", "question", "whether", "nobler"]


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    found = pytest.importorskip("ray", reason="ray is not installed: pip install pyrformer[ray]")
    found.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield found
    found.shutdown()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    draw = random.Random(0)
    lines = (json.dumps({"text": " ".join(draw.choices(WORDS, k=60))}) for _ in range(40_000))
    path = tmp_path / "text.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("killed", [False, True])
def test_a_cluster_writes_the_same_bytes(ray: Any, source: Path, tmp_path: Path, killed: bool) -> None:
    tokenizer = pf.Tokenizer.train(iter([" ".join(WORDS)] * 9), "bpe", 280)
    options: dict[str, Any] = {"clean": ["duplicates", "whitespace"], "shard_tokens": 500_000}
    local = pf.prepare(source, tmp_path / "local", tokenizer, **options)
    assert len(local["shards"]) > 2

    @ray.remote
    def who() -> int:
        time.sleep(0.3)
        return os.getpid()

    workers, victims = set(ray.get([who.remote() for _ in range(2)])), set()

    def progress(read: int, documents: int, tokens: int) -> None:
        if killed and tokens and not victims:
            victims.update(workers)
            for worker in workers:
                os.kill(worker, signal.SIGKILL)

    pf.prepare(source, tmp_path / "ray", tokenizer, engine="ray", progress=progress, **options)
    assert victims == (workers if killed else set())
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")
    others = set(ray.get([who.remote() for _ in range(2)]))
    assert (others == workers) is not killed


def test_without_ray_it_is_named(monkeypatch: pytest.MonkeyPatch, source: Path, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    tokenizer = pf.Tokenizer.train(iter([" ".join(WORDS)] * 9), "bpe", 280)
    with pytest.raises(InputError, match=r"pyrformer\[ray\]"):
        pf.prepare(source, tmp_path / "out", tokenizer, engine="ray")
    with pytest.raises(InputError, match="engine must be one of local, ray"):
        pf.prepare(source, tmp_path / "out2", tokenizer, engine="dask")
