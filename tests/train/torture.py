"""Kills training and breaks its writes, many times, and checks each time that the run goes on to the right end.

Run by ``test_torture.py`` in a process of its own, with ``faults.c`` loaded: ``python torture.py FOLDER KIND CASES
SEED``. Each case is a forked child, so that a case costs no start of the interpreter. Prints a JSON line.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recipes import OBJECTIVES, write_text

import pyrformer as pf
from pyrformer.training import trainer  # imported before the forks

KILL, SHORT = -1, -2
ERRORS = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC, "short write": SHORT, "kill": KILL}
STEPS = 12


class Torture:
    """One kind of torture of one run."""

    def __init__(self, folder: Path, objective: str, seed: int):
        self.folder, self.objective, self.random = folder, objective, random.Random(seed)
        self.text = write_text(folder, objective)
        self.library = ctypes.CDLL(None)
        self.outcomes: Counter[str] = Counter()

    def config(self, out: Path, **more: Any) -> pf.TrainConfig:
        small = {"seq_len": 12, "batch_size": 2, "max_steps": STEPS, "warmup_steps": 2, "log_every": 1}
        every = {"eval_every": 5, "save_every": 2, "learning_rate": 1e-2, "seed": 5, "threads": 1}
        options = {**small, **every, **OBJECTIVES[self.objective], **more}
        return pf.TrainConfig(files=[str(self.text)], out=str(out), **options)

    def child(self, work: Callable[[], None], kill_after: float | None = None) -> int:
        """Runs ``work`` in a fork; its exit status as ``waitpid`` gives it."""
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                work()
                code = 0
            except pf.Error as e:
                code = 2
                if "Traceback" in str(e) or "\n" in str(e):
                    code = 3
            except BaseException as e:
                sys.stderr.write(f"{e!r}\n")
            finally:
                os._exit(code)
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(pid, signal.SIGKILL)
        return os.waitpid(pid, 0)[1]

    def train(self, out: Path, **more: Any) -> None:
        resume = (out / "training.json").is_file()
        trainer.train(self.config(out, resume=resume, **more))

    def finish(self, out: Path, want: dict[str, Any], **more: Any) -> None:
        """Goes on to the end and compares."""
        status = self.child(lambda: self.train(out, **more))
        if status != 0 or result(out) != want:
            raise SystemExit(f"{out} ended with status {status}; equal: {result(out) == want}")
        left = [p.name for p in out.iterdir() if p.name.endswith(".partial")]
        if left:
            raise SystemExit(f"{out} holds {left}")

    def straight(self) -> tuple[dict[str, Any], float]:
        out, began = self.folder / "straight", time.perf_counter()
        if self.child(lambda: self.train(out)) != 0:
            raise SystemExit("the undisturbed run failed")
        return result(out), time.perf_counter() - began

    def kills(self, cases: int) -> None:
        """SIGKILL at random moments, several times in one run."""
        want, seconds = self.straight()
        killed, i = 0, 0
        while killed < cases:
            out = self.folder / f"run-{i}"
            for _ in range(4):
                after = self.random.uniform(0, seconds)
                killed += os.WIFSIGNALED(
                    self.child(lambda out=out, i=i: self.train(out, threads=1 + i % 3), after)
                )
            self.finish(out, want, threads=1 + i % 2)
            shutil.rmtree(out)
            i += 1
        self.outcomes["killed at a random moment"] = killed

    def faults(self, cases: int) -> None:
        """Each file operation of a run fails, or is the last, in turn."""
        want, _ = self.straight()
        count = self.folder / "count"
        out = self.folder / "counted"

        def counted() -> None:
            self.library.fault_arm(str(out).encode(), ctypes.c_long(-1), 0)
            self.train(out)
            count.write_text(str(self.library.fault_count()), encoding="utf-8")

        self.child(counted)
        calls = int(count.read_text("utf-8"))
        places = [(n, name) for n in range(calls) for name in ERRORS]
        self.random.shuffle(places)
        self.outcomes["places that can fail"] = len(places)
        for i, (n, name) in enumerate(places[:cases]):
            out = self.folder / f"run-{i}"

            def broken(out: Path = out, n: int = n, name: str = name) -> None:
                self.library.fault_arm(str(out).encode(), ctypes.c_long(n), ERRORS[name])
                self.train(out)

            status = self.child(broken)
            if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status) not in (0, 2):
                raise SystemExit(f"call {n} of {calls}, {name}: status {status}")
            self.outcomes[name] += 1
            self.finish(out, want)
            shutil.rmtree(out)

    def damage(self, cases: int) -> None:
        """A file of the newest checkpoint is cut off, changed, or gone: the one before is taken."""
        want, _ = self.straight()
        out = self.folder / "damaged"
        self.child(lambda: self.train(out, max_steps=STEPS, save_total_limit=2))
        for i in range(cases):
            run = self.folder / f"run-{i}"
            shutil.copytree(out, run)
            newest = run / f"checkpoint-{STEPS}"
            file = self.random.choice(sorted(newest.iterdir()))
            data = bytearray(file.read_bytes())
            kind = self.random.choice(("cut off", "changed", "gone"))
            if kind == "cut off":
                del data[self.random.randrange(len(data)) :]
            elif kind == "changed":
                data[self.random.randrange(len(data))] ^= 1 << self.random.randrange(8)
            file.unlink()
            if kind != "gone":
                file.write_bytes(data)
            self.outcomes[kind] += 1
            self.finish(run, want)
            shutil.rmtree(run)


def result(run: Path) -> dict[str, Any]:
    """All that must be the same: weights, states, and metrics but for the clock."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    names = ("step", "loss", "learning_rate", "grad_norm", "update_ratio", "valid_loss", "loss_spikes")
    last = run / f"checkpoint-{STEPS}"
    files = [run / "model.safetensors", run / "config.json", run / "tokenizer.json"]
    files += [last / "model.safetensors", last / "optimizer.safetensors"]
    return {
        "rows": [{n: row[n] for n in names if n in row} for row in rows],
        "files": [path.read_bytes() for path in files],
    }


if __name__ == "__main__":
    place, kind, number, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    totals: Counter[str] = Counter()
    for name in OBJECTIVES:
        (place / name).mkdir()
        torture = Torture(place / name, name, seed)
        getattr(torture, kind)(number)
        totals += torture.outcomes
    sys.stdout.write(json.dumps(totals) + "\n")
