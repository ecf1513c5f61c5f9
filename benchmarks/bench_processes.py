"""Training by several processes on one machine: updates a second by 1, 2 … processes of one thread each, in turns.

    python benchmarks/bench_processes.py --model
    python benchmarks/bench_processes.py [--turns 3] [--processes 1 2] [--width 256] [--layers 4] [--batch 4]
        [--seq 128]

Every process count trains the same model on the same batches to the same bits. Efficiency is the time of one process
over N times that of N. The share of the update that N processes spend on each other, and not on passes, is what they
wait for gradients that are still on the way when a pass is over, the owners' updates, and the new weights.

With --model nothing is measured: what 8 to 1024 GPUs would do on paper, by compute, bytes, messages and overlap.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

WORKER = """
import json, sys, time
import pyrformer as pf
from dataclasses import replace
from pyrformer.training.sharing import Sharing
from pyrformer.training.updates import Updates
spent = [0.0]
def timed(owner, name):
    inner = getattr(owner, name)
    def outer(*arguments):
        began = time.perf_counter()
        try:
            return inner(*arguments)
        finally:
            spent[0] += time.perf_counter() - began
    setattr(owner, name, outer)
timed(Sharing, "end_round")
timed(Updates, "_shared_end")
begin = Updates.begin
rows = []
def watched(self, step, *given):
    spent[0] = 0.0
    begun = begin(self, step, *given)
    numbers = begun.numbers()
    rows.append((numbers["tokens_per_s"], spent[0]))
    return replace(begun, numbers=lambda: numbers)
Updates.begin = watched
options, out = json.loads(sys.argv[1]), sys.argv[2]
run = pf.train(pf.TrainConfig(**options))
if "PMI_RANK" not in __import__("os").environ or __import__("os").environ["PMI_RANK"] == "0":
    open(out, "w").write(json.dumps({"rows": rows[2:], "parameters": run.model.parameter_count}))
"""


#: An H100 SXM: peak of dense bfloat16, and the share of it that is reached.
PEAK, REACHED = 989e12, 0.4
#: Bytes a second and GPU, one way: NVLink inside a machine of eight, 400 Gbit/s InfiniBand between machines.
NVLINK, NETWORK = 450e9, 50e9
#: Seconds that a message costs besides its bytes.
MESSAGE = 5e-6
#: The share of a pass that is its backward half, beside which gradients travel.
BACKWARD = 2 / 3


def modelled(parameters: float, gpus: int, tokens: int) -> tuple[float, float, float, float]:
    """Seconds of an update by so many GPUs, one batch of ``tokens`` each: compute, gradients, weights; efficiency.

    A rank receives its part of everyone's gradients, and then everyone's part of the weights: 4·P·(N − 1)/N bytes each,
    in 4·(N − 1) messages. What the backward pass does not hide of the first, and all of the second, is waited for; the
    gradients of the last of a rank's buckets can only leave behind the pass.
    """
    compute = 6 * parameters * tokens / (PEAK * REACHED)
    link = NVLINK if gpus <= 8 else NETWORK
    one_way = 4 * parameters * (gpus - 1) / gpus / link + 4 * (gpus - 1) * MESSAGE
    hidden = min(one_way * (1 - 1 / (4 * gpus)), BACKWARD * compute)
    return compute, one_way, one_way, compute / (compute + one_way - hidden + one_way)


def print_model() -> None:
    """Prints the table."""
    print("| parameters | tokens a GPU | GPUs | compute, ms | gradients, ms | weights, ms | efficiency |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for parameters, tokens in ((124e6, 16384), (1.3e9, 16384), (7e9, 16384)):
        for gpus in (8, 64, 256, 1024):
            compute, gradients, weights, efficiency = modelled(parameters, gpus, tokens)
            times = " | ".join(f"{1e3 * s:.1f}" for s in (compute, gradients, weights))
            print(f"| {parameters / 1e6:,.0f}M | {tokens:,} | {gpus} | {times} | {efficiency:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, default in (
        ("turns", 3),
        ("width", 256),
        ("layers", 4),
        ("batch", 4),
        ("seq", 128),
        ("parts", 4),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--model", action="store_true")
    a = parser.parse_args()
    if a.model:
        print_model()
        return
    mpiexec = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")
    found: dict[int, list[tuple[float, float]]] = {n: [] for n in a.processes}
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "text.txt")
        text.write_text("The king and the queen went over the hill to the sea; nobody saw them.\n" * 4000)
        model = {
            "model_type": "gpt2",
            "n_embd": a.width,
            "n_layer": a.layers,
            "n_head": 4,
            "n_positions": a.seq,
        }
        options = {
            "files": [str(text)],
            "model": model,
            "tokenizer": {"kind": "char"},
            "seq_len": a.seq,
            "batch_size": a.batch,
            "gradient_accumulation_steps": a.parts,
            "max_steps": a.steps,
            "warmup_steps": 1,
            "threads": 1,
            "eval_every": 0,
            "save_every": 0,
        }
        tokens = a.batch * a.parts * a.seq
        for turn in range(a.turns):
            for n in a.processes:
                out = Path(folder, "numbers.json")
                given = json.dumps({**options, "out": str(Path(folder, f"run-{turn}-{n}"))})
                worker = [sys.executable, "-c", WORKER, given, str(out)]
                command = worker if n == 1 else [str(mpiexec), "-n", str(n), *worker]
                subprocess.run(command, check=True, env={**os.environ, "PYTHONWARNINGS": "ignore"})
                numbers = json.loads(out.read_text())
                found[n] += [(tokens / rate, spent) for rate, spent in numbers["rows"]]
    print(f"{numbers['parameters']:,} parameters, {a.parts} batches of {a.batch} × {a.seq} tokens an update")
    print(
        "| processes | s an update (median) | efficiency | of it for the others |\n| --- | --- | --- | --- |"
    )
    alone = statistics.median(seconds for seconds, _ in found[a.processes[0]])
    for n, rows in found.items():
        seconds, spent = (statistics.median(column) for column in zip(*rows, strict=True))
        efficiency = alone * a.processes[0] / (seconds * n)
        print(f"| {n} | {seconds:.3f} | {efficiency:.2f} | {spent / seconds:.1%} |")


if __name__ == "__main__":
    main()
