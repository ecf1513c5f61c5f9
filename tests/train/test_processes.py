"""Training by several processes: the bits do not depend on how many, an end of one is the end of all."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recipes import OBJECTIVES, TEXT

import pyrformer as pf
from pyrformer import programs
from pyrformer.training import updates
from pyrformer.training.checkpoints import Checkpoints
from pyrformer.training.comm import Alone
from pyrformer.training.passes import Passes, Update
from pyrformer.training.sharing import Sharing, buckets

BESIDE = shutil.which("mpiexec", path=str(Path(sys.executable).parent))
MPIEXEC = BESIDE or shutil.which("mpiexec")
pytestmark = pytest.mark.skipif(
    MPIEXEC is None or find_spec("mpi4py") is None, reason="MPI is not installed: pip install pyrformer[mpi]"
)

SMALL = {"seq_len": 16, "batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 6, "warmup_steps": 1}

#: Trains by the options in its argument, after what the third one says; process 1 does what the second one says before
#: step 3.
SCRIPT = """
import json, os, pathlib, sys
import pyrformer as pf
from pyrformer.training.updates import Updates
from pyrformer.errors import Error
from pyrformer.training import comm
rank, comm.PATIENCE = comm.launched_rank(), 1.0
options, fault = json.loads(sys.argv[1]), sys.argv[2]
exec(sys.argv[3])
begin = Updates.begin
def faulty(self, step, *given):
    place = pathlib.Path(options["out"], f"pid-{rank}")
    if not place.exists():
        place.with_suffix(".part").write_text(str(os.getpid()))
        place.with_suffix(".part").rename(place)
    if rank == 1 and step == 3 and fault:
        eval(fault)
    return begin(self, step, *given)
Updates.begin = faulty
try:
    pf.train(pf.TrainConfig(**options))
except Error as e:
    print(f"{rank}: {e}", file=sys.stderr)
    sys.exit(2)
"""
#: Makes a gradient of process 1 no numbers.
SPOIL = (
    "(lambda s, add: setattr(s, 'add', lambda n, g: (setattr(s, 'add', add), add(n, g * float('nan')))))"
    "(self.sharing, self.sharing.add)"
)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def options(text: Path, out: Path, objective: str = "ar", **more: Any) -> dict[str, Any]:
    small = {**SMALL, "log_every": 1, "seed": 3, "threads": 1, "eval_every": 3}
    return {"files": [str(text)], "out": str(out), **small, **OBJECTIVES[objective], **more}


def start(processes: int, given: dict[str, Any], fault: str = "", before: str = "") -> subprocess.Popen[str]:
    arguments = [json.dumps(given), fault, before]
    command = [str(MPIEXEC), "-n", str(processes), sys.executable, "-c", SCRIPT, *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(processes: int, given: dict[str, Any], fault: str = "", before: str = "") -> tuple[int, str]:
    with start(processes, given, fault, before) as job:
        try:
            _, errors = job.communicate(timeout=90)
        finally:
            job.kill()
    return job.returncode, errors


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.parametrize("objective", ["ar", "mlm"])
def test_two_and_four_processes_give_the_same_bits(text: Path, tmp_path: Path, objective: str) -> None:
    folders = {n: tmp_path / f"run-{n}" for n in (1, 2, 4)}
    pf.train(pf.TrainConfig(**options(text, folders[1], objective)))
    for n in (2, 4):
        assert run(n, options(text, folders[n], objective)) == (0, "")
    one = rows(folders[1])
    for n in (2, 4):
        assert weights(folders[n]) == weights(folders[1])
        for name in ("loss", "grad_norm", "valid_loss"):
            assert [r[name] for r in rows(folders[n]) if name in r] == [r[name] for r in one if name in r]
        last = f"checkpoint-{SMALL['max_steps']}"
        for file in ("model.safetensors", "optimizer.safetensors"):
            assert (folders[n] / last / file).read_bytes() == (folders[1] / last / file).read_bytes()


@pytest.mark.parametrize("optim", ["muon", "adafactor", "adamw"])
def test_optimizers_of_whole_matrices_averages_and_rounding_by_chance_are_shared_out(
    text: Path, tmp_path: Path, optim: str
) -> None:
    folders = {n: tmp_path / f"run-{n}" for n in (1, 2)}
    more = {"optim": optim, "ema_decay": 0.9, "sample_prompts": ["a"], "sample_every": 3}
    more["optim_args"] = {"stochastic_rounding": True} if optim == "adamw" else {}
    pf.train(pf.TrainConfig(**options(text, folders[1], **more)))
    assert run(2, options(text, folders[2], **more)) == (0, "")
    assert weights(folders[2]) == weights(folders[1])
    assert (folders[2] / "samples.jsonl").read_bytes() == (folders[1] / "samples.jsonl").read_bytes()


def test_moments_are_there_once(text: Path, tmp_path: Path) -> None:
    """Each process holds the states of its own parameters only, and together they hold all."""
    check = (
        "pathlib.Path(options['out'], 'kept').write_text(json.dumps([sorted(self.sharing.owned), "
        "sorted(n for n, _, _ in self.model.store.types() if n.startswith('optimizer.m.'))]))"
    )
    assert run(2, options(text, tmp_path / "run"), check) == (0, "")
    owned, kept = json.loads((tmp_path / "run" / "kept").read_text())
    assert kept == [f"optimizer.m.{name}" for name in owned]
    assert 0 < len(owned) < len(pf.load(tmp_path / "run").state_dict())


def test_an_update_that_one_process_spoils_is_left_out_by_all(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "spoilt"
    assert run(2, options(text, out, on_nonfinite="skip"), SPOIL) == (0, "")
    assert [row["step"] for row in rows(out) if "loss" in row] == [1, 2, 3, 5, 6]
    assert all(np.isfinite(value).all() for value in pf.load(out).state_dict().values())
    code, errors = run(2, options(text, tmp_path / "stopped"), SPOIL)
    assert code == 2
    assert errors.count("step 4: the loss is") == 2


def test_all_halve_the_scale_at_an_overflow_of_one(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And scale as a single process does, to the bit."""
    before = "from pyrformer.training import updates; updates.first_scale = lambda _: updates.LossScale()"
    assert run(2, options(text, tmp_path / "two"), SPOIL, before) == (0, "")
    monkeypatch.setattr(updates, "first_scale", lambda _: updates.LossScale())
    ready = Passes.ready

    def planted(self: Passes, batch: Any, draw: int, update: Update) -> Any:
        program, inputs = ready(self, batch, draw, update)
        return program, inputs | ({"loss_scale": np.inf} if update.step == 3 else {})

    monkeypatch.setattr(Passes, "ready", planted)
    pf.train(pf.TrainConfig(**options(text, tmp_path / "one")))
    assert weights(tmp_path / "two") == weights(tmp_path / "one")
    for folder in ("one", "two"):
        scales = [(r["step"], r["loss_scale"]) for r in rows(tmp_path / folder) if "loss" in r]
        assert scales == [(1, 65536.0), (2, 65536.0), (3, 65536.0), (5, 32768.0), (6, 32768.0)]


def test_a_run_goes_on_with_any_number_of_processes(text: Path, tmp_path: Path) -> None:
    straight, even = tmp_path / "straight", {"lr_scheduler_type": "constant_with_warmup"}
    assert run(2, options(text, straight, **even)) == (0, "")
    half = tmp_path / "half"
    assert run(2, options(text, half, max_steps=3, **even)) == (0, "")
    for n in (1, 4):
        again = Path(shutil.copytree(half, tmp_path / f"again-{n}"))
        given = options(text, again, resume=True, **even)
        if n == 1:
            pf.train(pf.TrainConfig(**given))
        else:
            assert run(n, given) == (0, "")
        assert weights(again) == weights(straight)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_all_and_leaves_a_good_checkpoint(
    text: Path, tmp_path: Path, victim: int
) -> None:
    out = tmp_path / "run"
    given = options(text, out, max_steps=100_000, save_every=5, eval_every=0, save_total_limit=2)
    with start(2, given) as job:
        try:
            began = time.monotonic()
            while not list(out.glob("checkpoint-*")) or len(list(out.glob("pid-?"))) < 2:
                assert job.poll() is None
                assert time.monotonic() - began < 60
                time.sleep(0.02)
            os.kill(int((out / f"pid-{victim}").read_text()), signal.SIGKILL)
            began = time.monotonic()
            job.communicate(timeout=20)
            assert time.monotonic() - began < 10
            assert job.returncode != 0
        finally:
            job.kill()
    for path in out.glob("pid-?"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)
    newest, skipped = Checkpoints(out, 0).newest()
    assert newest
    assert not skipped
    assert run(2, {**given, "resume": True, "max_steps": newest + 2}) == (0, "")


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("exec('raise Error(\"[test] no\")')", "process 1: [test] no"),
        ("1 / 0", "ZeroDivisionError"),
    ],
)
def test_an_error_of_one_process_ends_all(text: Path, tmp_path: Path, fault: str, said: str) -> None:
    began = time.monotonic()
    code, errors = run(2, options(text, tmp_path / "run"), fault)
    assert code != 0
    assert said in errors
    assert time.monotonic() - began < 40


def test_an_error_of_all_is_told_by_all(text: Path, tmp_path: Path) -> None:
    code, errors = run(3, options(text, tmp_path / "run"))
    assert code == 2
    assert errors.count("gradient_accumulation_steps (4) must be a multiple of 3") == 3
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    code, errors = run(2, options(text, tmp_path / "taken"))
    assert code == 2
    assert errors.count("give --resume to go on") == 2


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_the_command_speaks_once_and_saves_on_a_signal(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    code = "from pyrformer.cli import main; main()"
    sizes = "--layers 1 --width 16 --heads 2 --seq-len 16 --batch-size 2 --gradient-accumulation-steps 2"
    rest = (
        f"--tokenizer char --max-steps 100000 --save-every 1000000 --log-every 1 --out {out} {sizes}".split()
    )
    command = [str(MPIEXEC), "-n", "2", sys.executable, "-c", code, "train", str(text), *rest]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as job:
        try:
            while not (out / "metrics.jsonl").is_file() or not (out / "metrics.jsonl").stat().st_size:
                assert job.poll() is None
                time.sleep(0.02)
            job.terminate()
            said, _ = job.communicate(timeout=30)
        finally:
            job.kill()
    assert said.count("interrupted after step") == 1
    assert said.count("tokens to learn from") == 1
    (step,) = (row["step"] for row in rows(out)[-1:])
    newest, _ = Checkpoints(out, 0).newest()
    assert newest == step


def test_gradients_are_told_from_the_last_layer_on() -> None:
    config = {
        "model_type": "gpt2",
        "n_embd": 16,
        "n_layer": 3,
        "n_head": 2,
        "n_positions": 8,
        "vocab_size": 11,
    }
    model = pf.Model.from_config(config, seed=1)
    batch = model.batch([[1, 2, 3, 4]], labels=[[1, 2, 3, 4]])
    make = partial(programs.gradients, model.family, batch.sizes)
    program = model.program(("gradients", batch.sizes), make)
    inputs = {**batch.arrays, "loss_scale": 0.25}
    told: dict[str, Any] = {}
    program.tell(told.__setitem__, **inputs)
    whole = program(**inputs)
    assert told.keys() == whole.keys()
    for name, value in whole.items():
        np.testing.assert_array_equal(told[name], value)
    layers = [int(n.split(".")[3]) for n in told if ".h." in n]
    assert layers == sorted(layers, reverse=True)
    assert next(iter(told)) == "loss"
    with pytest.raises(KeyError, match="stop"):
        program.tell(lambda name, value: {}["stop"], **inputs)


def test_buckets_go_round() -> None:
    shapes = {"embed": (100, 8), "a": (3, 5), "b": (), "c": (7,), "d": (20,)}
    for size in (1, 2, 3, 7):
        found = buckets(shapes, size)
        assert [n for b in found for n in b.shapes] == ["d", "c", "b", "a", "embed"]
        assert {b.owner for b in found} == set(range(min(size, len(found))))
    assert [len(b.shapes) for b in buckets(shapes, 2)] == [4, 1]


def test_sums_are_those_of_the_arrays() -> None:
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 5), "b": (), "c": (7,), "d": (600, 40)}
    sharing = Sharing(Alone(), shapes)
    for _ in range(2):
        parts = [{n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()} for _ in range(3)]
        for part in parts:
            for name in reversed(shapes):
                sharing.add(name, part[name])
            sharing.end_round()
        sums, norm = sharing.take()
        for name, value in sums.items():
            np.testing.assert_array_equal(value, (parts[0][name] + parts[1][name]) + parts[2][name])
        assert norm == pytest.approx(
            np.sqrt(sum(float((v.astype(np.float64) ** 2).sum()) for v in sums.values()))
        )
