"""Models as handles: in other processes, in threads, in forked children; each gives what the model alone gives."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import pyrformer as pf
from pyrformer.errors import FileError, StateError
from pyrformer.optimizers import AdamW

TEXTS = ["the cat sat", "on the mat the king slept", "a cat", "the mat on the mat on the mat"]
CONFIG = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
FORK = "fork" in multiprocessing.get_all_start_methods()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = pf.Tokenizer.train(iter(TEXTS * 9), kind="bpe", vocab_size=280)
    model = pf.Model.from_config({**CONFIG, "vocab_size": tokenizer.vocab_size}, seed=1, tokenizer=tokenizer)
    # Fresh logits are almost flat: larger weights make the choices of a search certain.
    model.load_state_dict({k: v * 8 if v.ndim > 1 else v for k, v in model.state_dict().items()})
    folder = tmp_path_factory.mktemp("handles") / "run"
    model.save(folder)
    return folder


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


def log_likelihood(model: pf.Model, text: str) -> float:
    return float(model.score([text]).log_likelihood[0])


def test_workers_open_the_model_again(run: Path) -> None:
    model = pf.load(run, threads=1)
    assert len(pickle.dumps(model)) < 2000
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        # A method of the model, not a function from here: workers find the installed package only.
        found = [float(s.log_likelihood[0]) for s in pool.map(model.score, [[text] for text in TEXTS])]
    assert found == [log_likelihood(model, text) for text in TEXTS]


def test_a_process_opens_a_handle_once(run: Path) -> None:
    model = pf.load(run, threads=1)
    first, second = (pickle.loads(pickle.dumps(model)) for _ in range(2))
    assert first is second
    assert (first.threads, first.dtype) == (1, "float32")
    assert copy.deepcopy(model) is not first


def test_gguf_files_are_handles_too(saved: Path, tmp_path: Path) -> None:
    pf.load(saved).save(tmp_path / "model.gguf", "f32")
    model = pf.load(tmp_path / "model.gguf")
    assert pickle.loads(pickle.dumps(model)).origin == model.origin


WORKER = """
import pickle, sys
model = pickle.load(sys.stdin.buffer)
print(float(model.score(["the cat sat"]).log_likelihood[0]), flush=True)
sys.stdin.buffer.read()
"""


@pytest.mark.skipif(
    not Path("/proc/self/smaps").exists(), reason="/proc/PID/smaps says what is shared, on Linux"
)
def test_workers_share_the_memory_of_weights(run: Path, tmp_path: Path) -> None:
    small = pf.load(run)
    wide = {**CONFIG, "n_embd": 256, "vocab_size": small.require_tokenizer().vocab_size}
    folder = tmp_path / "wide"
    pf.Model.from_config(wide, seed=1, tokenizer=small.tokenizer).save(folder)
    model = pf.load(folder, threads=1)
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(4)
    ]
    try:
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write(pickle.dumps(model))
            worker.stdin.flush()
        said = [float(worker.stdout.readline()) for worker in workers if worker.stdout is not None]
        assert said == [log_likelihood(model, "the cat sat")] * 4
        maps = [mapped(worker.pid, "model.safetensors") for worker in workers]
    finally:
        for worker in workers:
            worker.communicate()
    size = (folder / "model.safetensors").stat().st_size
    # Each has all of it in reach, none a page of its own, and all together hold it once.
    for one in maps:
        assert one["Rss"] > 0.5 * size
        assert one["Private_Dirty"] == 0
    assert sum(one["Pss"] for one in maps) < 1.05 * size


def mapped(pid: int, name: str) -> dict[str, int]:
    """What a process's maps of a file take, in bytes."""
    totals: dict[str, int] = {}
    ours = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        key, *rest = line.split()
        if not key.endswith(":"):
            ours = line.endswith(name)
        elif ours and rest[-1] == "kB":
            totals[key[:-1]] = totals.get(key[:-1], 0) + 1024 * int(rest[0])
    return totals


def test_mapped_weights_are_the_same_and_copied_where_written(run: Path) -> None:
    copied, one, other = pf.load(run), pf.load(run, mmap=True), pf.load(run, mmap=True)
    before = (run / "model.safetensors").read_bytes()
    assert log_likelihood(one, TEXTS[1]) == log_likelihood(copied, TEXTS[1])
    changed_weights(one)
    assert log_likelihood(one, TEXTS[1]) != log_likelihood(copied, TEXTS[1])
    assert log_likelihood(other, TEXTS[1]) == log_likelihood(copied, TEXTS[1])
    # Saving over the folder replaces its file; what is mapped is the old one.
    one.save(run)
    assert log_likelihood(other, TEXTS[1]) == log_likelihood(copied, TEXTS[1])
    assert (run / "model.safetensors").read_bytes() != before


def changed_weights(model: pf.Model) -> None:
    model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()})


def lora(model: pf.Model) -> None:
    model.add_lora(r=2)


def trained(model: pf.Model) -> None:
    from pyrformer import programs

    sizes = programs.Sizes(1, 4)
    make = partial(programs.train_step, model.family, sizes, AdamW())
    model.program(("train_step", sizes), make)


def other_tokenizer(model: pf.Model) -> None:
    model.tokenizer = None


def other_settings(model: pf.Model) -> None:
    model.generation_config["top_k"] = 3


@pytest.mark.parametrize("change", [changed_weights, lora, trained, other_tokenizer, other_settings])
def test_a_changed_model_is_refused(run: Path, change: object) -> None:
    model = pf.load(run)
    model.generate("the", max_new_tokens=3)  # reading changes nothing
    pickle.dumps(model)
    change(model)  # type: ignore[operator]
    for take in (pickle.dumps, copy.deepcopy):
        with pytest.raises(StateError, match="save it, and open what was saved"):
            take(model)


def test_a_model_made_in_memory_is_refused() -> None:
    with pytest.raises(StateError, match="made or changed in memory"):
        pickle.dumps(pf.Model.from_config({**CONFIG, "vocab_size": 40}))


def test_a_changed_folder_is_refused(run: Path) -> None:
    handle = pickle.dumps(pf.load(run))
    weights = run / "model.safetensors"
    os.utime(weights, ns=(1, 1))
    with pytest.raises(FileError, match="was changed after"):
        pickle.loads(handle)
    shutil.rmtree(run)
    with pytest.raises(FileError, match="no folder"):
        pickle.loads(handle)


def test_repr_says_what_it_is(run: Path) -> None:
    said = repr(pf.load(run))
    assert said.startswith("Model(gpt2: 2 layers of width 32, ")
    assert "float32 on cpu" in said
    assert str(run) in said


def work(model: pf.Model, text: str) -> tuple[object, ...]:
    ids = np.array([model.require_tokenizer().encode(text).ids])
    drawn = model.generate(text, max_new_tokens=8, do_sample=True, seed=5)
    beams = model.generate(text, max_new_tokens=6, num_beams=2)
    return (
        log_likelihood(model, text),
        model.embed([text]).tobytes(),
        np.asarray(model(ids).logits).tobytes(),
        (drawn.ids, drawn.token_logprobs),
        (beams.ids, beams.scores),
        "".join(model.stream(text, max_new_tokens=8)),
    )


def test_threads_share_a_model(saved: Path) -> None:
    want = [work(pf.load(saved), text) for text in TEXTS]
    model = pf.load(saved)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            assert list(pool.map(partial(work, model), TEXTS)) == want
    assert len(model._caches) <= 4


def test_a_stream_leaves_the_model_free(saved: Path) -> None:
    model = pf.load(saved)
    want = "".join(model.stream("the cat", max_new_tokens=12))
    pieces = []
    for piece in model.stream("the cat", max_new_tokens=12):
        pieces.append(piece)
        model.generate("on the mat", max_new_tokens=4)
    assert "".join(pieces) == want


@pytest.mark.skipif(not FORK, reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_forked_children_use_the_model_while_threads_do(saved: Path) -> None:
    model = pf.load(saved, threads=2)
    want = [log_likelihood(model, text) for text in TEXTS]
    stop = threading.Event()

    def busy() -> None:
        while not stop.is_set():
            model.generate("the cat", max_new_tokens=20)

    threads = [threading.Thread(target=busy) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(4):
            with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
                assert list(pool.map(partial(log_likelihood, model), TEXTS, timeout=60)) == want
            child = multiprocessing.get_context("fork").Process(
                target=lambda: os._exit(0 if [log_likelihood(model, t) for t in TEXTS] == want else 1)
            )
            child.start()
            child.join(60)
            assert child.exitcode == 0
    finally:
        stop.set()
        for thread in threads:
            thread.join()
