"""How a run ends early: by a signal, by time, by a number that is none; and which checkpoints are left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recipes import GPT2, SMALL

import pyrformer as pf

TEXT = "the cat sat on the mat, and the dog lay by the door. " * 20


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def config(text: Path, **more: Any) -> pf.TrainConfig:
    given = {
        "files": [str(text)],
        "out": str(text.parent / "run"),
        **SMALL,
        "save_every": 3,
        "model": GPT2,
        **more,
    }
    return pf.TrainConfig(tokenizer={"kind": "char"}, **given)


def rows(run: pf.Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text("utf-8").splitlines()]


def steps(run: pf.Run) -> set[str]:
    return {p.name for p in run.folder.glob("checkpoint-*")}


def test_the_newest_checkpoints_are_kept(text: Path) -> None:
    assert steps(pf.train(config(text))) == {"checkpoint-9", "checkpoint-12"}
    assert steps(pf.train(config(text, overwrite=True, save_total_limit=0))) == {
        f"checkpoint-{i}" for i in (3, 6, 9, 12)
    }


def test_the_best_is_kept_and_left(text: Path) -> None:
    """The rate is so high at the end that the last model is not the best."""
    options = {"load_best_model_at_end": True, "eval_every": 1, "save_total_limit": 1, "max_steps": 30}
    run = pf.train(config(text, **options, learning_rate=0.3, lr_scheduler_type="constant"))
    measured = {row["step"]: row["valid_loss"] for row in rows(run) if "valid_loss" in row}
    best = min(measured, key=lambda step: measured[step])
    assert best < 30
    assert run.valid_loss == measured[best]
    assert steps(run) == {f"checkpoint-{best}", "checkpoint-30"}
    left, kept = pf.load(run.folder), pf.load(run.folder / f"checkpoint-{best}")
    ids = np.array([[1, 2, 3]])
    assert np.array_equal(left(ids).logits, kept(ids).logits)


def test_another_text_is_refused(text: Path) -> None:
    pf.train(config(text))
    text.write_text(TEXT.replace("cat", "mat"), encoding="utf-8")
    with pytest.raises(pf.Error, match="another text"):
        pf.train(config(text, resume=True, max_steps=14))


def test_a_file_that_vanished_leaves_the_checkpoints(text: Path) -> None:
    run = pf.train(config(text))
    before = steps(run)
    text.unlink()
    with pytest.raises(pf.Error, match=r"text\.txt"):
        pf.train(config(text, resume=True, max_steps=14))
    assert steps(run) == before


def test_max_time_ends_and_resumes(text: Path) -> None:
    begun = time.monotonic()
    run = pf.train(config(text, max_steps=1_000_000, max_time="1s", save_every="0.2s", log_every=0))
    assert time.monotonic() - begun < 20
    assert 1 <= run.steps < 1_000_000
    assert f"checkpoint-{run.steps}" in steps(run)
    assert pf.train(config(text, max_steps=run.steps + 1, resume=True)).steps == run.steps + 1


def sleeping(at: int) -> Any:
    """An ``on_event`` with which a second passes in an update; it keeps the notes and the evaluated steps."""

    def watch(kind: str, numbers: dict[str, Any]) -> None:
        if kind == "step" and numbers["step"] == at:
            time.sleep(1.1)
        watch.seen.append(numbers["what"] if kind == "note" else (kind, numbers.get("step")))

    watch.seen = []
    return watch


def test_what_max_time_measures_is_no_part_of_the_run(text: Path) -> None:
    """The evaluation at its end counts for no patience: the run goes on to the bits of an undisturbed one."""
    options = {"eval_every": 4, "early_stopping_patience": 2, "learning_rate": 0.05, "save_total_limit": 0}
    straight = pf.train(config(text, **options, out=str(text.parent / "straight")))
    watch = sleeping(at=6)
    first = pf.train(config(text, **options, max_time="1s"), watch)
    assert first.steps == 6
    assert f"step 6: 1s are over; {first.folder} goes on with --resume" in watch.seen
    again = pf.train(config(text, **options, resume=True))
    assert again.steps == straight.steps == 12
    states = [
        json.loads((run.folder / "checkpoint-12" / "trainer_state.json").read_text("utf-8"))
        for run in (straight, again)
    ]
    for name in ("best", "best_step", "judged", "patience_used", "recent"):
        assert states[0][name] == states[1][name]
    weights = [(run.folder / "model.safetensors").read_bytes() for run in (straight, again)]
    assert weights[0] == weights[1]


def test_max_time_saves_before_it_measures(text: Path) -> None:
    class Killed(Exception):
        pass

    class Fails:
        def log(self, data: dict[str, Any], step: int) -> None:
            if "valid_loss" in data:
                raise Killed

    with pytest.raises(Killed):
        pf.train(config(text, max_time="1s", save_every=0), sleeping(at=5), callbacks=[Fails()])
    assert (text.parent / "run" / "checkpoint-5" / "manifest.json").is_file()


def test_a_step_is_measured_once(text: Path) -> None:
    watch = sleeping(at=4)
    pf.train(config(text, eval_every=4, max_time="1s"), watch)
    assert [one for one in watch.seen if one[0] == "eval"] == [("eval", 4)]


def test_a_signal_ends_a_measurement(text: Path) -> None:
    """A signal that comes before an evaluation: the run is saved at once, and measures when it goes on."""
    seen: list[str] = []

    def stop(kind: str, numbers: dict[str, Any]) -> None:
        seen.append(kind)
        if kind == "step" and numbers["step"] == 4:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)

    options = {"eval_every": 4, "ema_decay": 0.5}
    straight = pf.train(config(text, **options, out=str(text.parent / "straight")))
    with pytest.raises(KeyboardInterrupt, match="after step 4"):
        pf.train(config(text, **options), stop)
    assert "eval" not in seen
    run = pf.train(config(text, **options, resume=True))
    measured = [[row for row in rows(one) if "valid_loss" in row] for one in (straight, run)]
    assert measured[0] == measured[1]
    files = [(one.folder / "model.safetensors").read_bytes() for one in (straight, run)]
    assert files[0] == files[1]


def test_a_failing_disk_is_told_with_what_to_do(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyrformer.training.rows import Metrics

    write = Metrics.write

    def full(self: Any, row: dict[str, Any]) -> None:
        if row["step"] == 8:
            raise OSError(28, "No space left on device")
        write(self, row)

    monkeypatch.setattr(Metrics, "write", full)
    with pytest.raises(
        pf.Error, match="No space left on device; once that is mended, --resume goes on from step 6"
    ):
        pf.train(config(text))


def test_what_a_killed_process_left_is_removed(text: Path) -> None:
    """Tokens that no run's folder holds; not those of a process that lives, nor of another run."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = [f".run.tokens.{dead.pid}.partial", f".run.{dead.pid}-5-18eaf2b6.partial"]
    kept = [f".run.tokens.{os.getppid()}.partial", f".run2.tokens.{dead.pid}.partial"]
    for name in names + kept:
        (text.parent / name).mkdir()
    pf.train(config(text))
    assert sorted(p.name for p in text.parent.glob(".run*")) == sorted(kept)


@pytest.mark.parametrize("value", ["soon", "10 minutes", "-3", "0m", "1e3s", ""])
def test_bad_times(text: Path, value: str) -> None:
    with pytest.raises(pf.Error):
        config(text, save_every=value)


def test_nonfinite_goes_back(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One update of which the weights would be destroyed is left out; the rest is made."""
    rate = pf.TrainConfig.rate
    monkeypatch.setattr(pf.TrainConfig, "rate", lambda c, step: float("nan") if step == 6 else rate(c, step))
    notes: list[str] = []
    run = pf.train(
        config(text, on_nonfinite="rollback", max_grad_norm=0.0),
        lambda kind, numbers: notes.append(numbers["what"]) if kind == "note" else None,
    )
    # The rate of update 7 makes the weights no numbers, which update 8 shows.
    assert any("back to step 6; going on without update 7" in note for note in notes)
    assert all(np.isfinite(values).all() for values in run.model.state_dict().values())
    assert all(np.isfinite(row["loss"]) for row in rows(run) if "loss" in row)


def test_what_is_watched(text: Path) -> None:
    seen: list[tuple[int, dict[str, Any]]] = []

    class Log:
        def log(self, data: dict[str, Any], step: int) -> None:
            seen.append((step, data))

    run = pf.train(config(text, eval_every=4), callbacks=[Log()])
    logged = [row for row in rows(run) if "loss" in row]
    assert [data for _, data in seen] == rows(run)
    for row in logged:
        assert 0 <= row["update_ratio"] < 1
        assert (row["update_ratio"] > 0) == (row["learning_rate"] > 0)
        assert row["grad_norm"] > 0
        assert 0 <= row["loader_wait_seconds"] < row["seconds"]
        assert row["rss_bytes"] > 1e6 or sys.platform != "linux"
        assert row["loss_spikes"] == row["grad_norm_spikes"] == 0
    data = json.loads((run.folder / "training.json").read_text("utf-8"))["data"]
    assert data["train_tokens"] > data["valid_tokens"] > 0
    assert (data["text_files"], data["text_bytes"]) == (1, len(TEXT))


def test_spikes() -> None:
    from pyrformer.training.watch import Spikes

    draws = np.random.default_rng(0).normal(3.0, 0.1, 300).tolist()
    spikes = Spikes()
    assert not any(spikes.add(x) for x in draws)
    assert spikes.add(4.0)
    assert not spikes.add(3.0)
    assert spikes.count == 1
    assert len(spikes.values) == 128
    assert not any(Spikes().add(x) for x in (0.0, 0.0, 1e9))  # too few values to judge by


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_second_signal_ends_at_once(text: Path) -> None:
    """Two signals in one long callback: the process does not wait for its end."""
    code = (
        "import sys, time, pyrformer as pf\n"
        "from pathlib import Path\n"
        "def wait(kind, numbers):\n"
        "    if kind == 'step': Path('ready').touch(); time.sleep(60)\n"
        f"pf.train(pf.TrainConfig(files=[{str(text)!r}], out='run', seq_len=8, model={GPT2!r}, "
        "tokenizer={'kind': 'char'}), wait)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=text.parent, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 60
        while not (text.parent / "ready").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGTERM)
        time.sleep(0.2)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(timeout=10) == 143
        assert process.stderr is not None
        said = process.stderr.read().decode().splitlines()
        process.stderr.close()
        assert said == [
            "stopping after this update; a second time ends at once",
            "pyrformer: ended at once; --resume goes on from the last checkpoint",
        ]
    finally:
        process.kill()
        process.wait()
