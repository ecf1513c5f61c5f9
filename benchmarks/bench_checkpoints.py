"""What checkpoints cost a training run: its time with them and without, step by step.

    python benchmarks/bench_checkpoints.py [--layers 6] [--width 256] [--steps 100] [--every 20] [--rounds 3]

The same run is made in turns, with a checkpoint every so many updates and with none, and the times of single updates
are taken. A checkpoint costs what training waits for (the copy of weights and moments, and the checkpoint before, if
that is still being written), and what updates take longer while a thread beside them writes, flushes and hashes. Both
are in the difference of the two runs' median update and in their sums; the shares are those at an interval of 500
updates, the default, and of 10 minutes.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

import pyrformer as pf


def updates(config: pf.TrainConfig) -> tuple[list[float], list[float], dict[str, Any]]:
    """Seconds of each update but the first ones, the wait in front of it included; of those behind a checkpoint; and
    the run's figures."""
    marks: list[tuple[float, bool]] = []
    saved, end = [False], {}

    def event(kind: str, numbers: dict[str, Any]) -> None:
        if kind == "save":
            saved[0] = True
        elif kind == "step":
            marks.append((time.perf_counter(), saved[0]))
            saved[0] = False
        elif kind == "end":
            end.update(numbers)

    pf.train(config, event)
    times = [(b - a, behind) for (a, _), (b, behind) in pairwise(marks[4:])]
    return [t for t, _ in times], [t for t, behind in times if behind], end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("layers", 6), ("width", 256), ("steps", 100), ("every", 20), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    model = {
        "model_type": "gpt2",
        "n_layer": asked.layers,
        "n_embd": asked.width,
        "n_head": asked.width // 64,
    }
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        letters = np.random.default_rng(0).choice(list("abcdefghij klmnop. "), 200_000)
        text.write_text("".join(letters), encoding="utf-8")
        base: dict[str, Any] = {"files": [str(text)], "model": model, "tokenizer": {"kind": "char"}}
        base |= {"seq_len": 128, "batch_size": 8, "max_steps": asked.steps, "log_every": asked.steps}
        base |= {"eval_every": 0, "overwrite": True, "valid_fraction": 0.01}
        plain, with_, behind, costs, waits = [], [], [], [], []
        for _ in range(asked.rounds):
            without, _, _ = updates(pf.TrainConfig(**base, out=f"{folder}/plain", save_every=0))
            every, after, end = updates(pf.TrainConfig(**base, out=f"{folder}/saved", save_every=asked.every))
            number = len(after)
            plain.append(statistics.median(without))
            with_.append(statistics.median(every))
            behind += after
            costs.append((sum(every) - len(every) * min(plain[-1], with_[-1])) / number)
            # What those without cost more than their median is noise, in both.
            costs[-1] -= (sum(without) - len(without) * plain[-1]) / number
            waits.append(end["save_stall_seconds"] / (number + 1))
        size = sum(p.stat().st_size for p in (Path(folder) / "saved").glob(f"checkpoint-{asked.steps}/*"))
    step, cost = statistics.median(plain), max(0.0, statistics.median(costs))
    said = f"{size / 1e6:.0f} MB a checkpoint, {1e3 * step:.0f} ms an update (median without checkpoints)\n"
    said += f"waited for the copy            {1e3 * statistics.median(waits):8.1f} ms a checkpoint\n"
    said += f"the update behind a checkpoint {1e3 * (statistics.median(behind) - step):8.1f} ms longer\n"
    said += f"all updates together           {1e3 * cost:8.1f} ms a checkpoint\n"
    said += f"share of a run that saves every 500 updates: {100 * cost / (500 * step + cost):.2f} %\n"
    said += f"share of a run that saves every 10 minutes:  {100 * cost / (600 + cost):.2f} %"
    print(said)


if __name__ == "__main__":
    main()
