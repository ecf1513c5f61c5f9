"""How long a process takes from its start to the first launch on a CUDA device, but for the driver.

python benchmarks/bench_cuda_start.py

Needs CuPy and NVRTC, but no GPU: a device that does nothing stands in for a real one. The first process compiles the
kernels for an H100, the others find them. Times are of the processor, in milliseconds, the median of five processes.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

RUNS = 5
GPT2 = {
    "model_type": "gpt2",
    "n_layer": 12,
    "n_embd": 768,
    "n_head": 12,
    "vocab_size": 50257,
    "n_positions": 1024,
}


class Nothing:
    """A device whose every call does nothing; addresses are made up."""

    def __init__(self, binaries: Any) -> None:
        self.address, self.size, self.binaries = 1 << 20, 0, binaries

    def memory(self, size: int, *, zero: bool = False) -> Nothing:
        """Memory at one and the same address."""
        made = Nothing(None)
        made.size = size
        return made

    def free_bytes(self) -> int:
        """As many as there might be."""
        return 1 << 40

    def pinned(self, size: int) -> Any:
        """Plain memory."""
        import numpy as np

        return np.zeros(size, np.uint8)

    def prepare(self, kernels: set[str]) -> None:
        """Compiles or finds the binaries, as the real device does before it loads them."""
        from pyrformer import _core

        files = [
            (name, text)
            for name, text, held, only in _core.cuda_sources()
            if not only and not kernels.isdisjoint(held)
        ]
        self.binaries.get(files)

    def __getattr__(self, name: str) -> Any:
        return lambda *_args, **_options: None


def start(cache: str) -> dict[str, float]:
    """All that comes before the first launch, in this process."""
    marks = [("python", time.process_time())]
    import cupy  # noqa: F401

    marks.append(("NumPy, CuPy", time.process_time()))
    from pathlib import Path

    from pyrformer.executors.cuda import compile_kernels
    from pyrformer.executors.kernels import Binaries
    from pyrformer.executors.program import Executor, Store
    from pyrformer.models import build
    from pyrformer.optimizers import AdamW
    from pyrformer.programs import Sizes, train_step

    marks.append(("pyrformer", time.process_time()))
    plan = train_step(build(GPT2), Sizes(8, 1024), AdamW(max_grad_norm=1.0)).lower("cuda").plan
    marks.append(("plan", time.process_time()))

    def compiler(name: str, text: str, options: tuple[str, ...]) -> tuple[bytes, str]:
        return compile_kernels(name, text, options, 90)

    device: Any = Nothing(Binaries("sm_90", "bench", compiler, Path(cache)))
    executor = Executor(plan, Store(device))
    marks.append(("kernels and records", time.process_time()))
    executor._resolve()
    executor._walk()
    marks.append(("addresses", time.process_time()))
    before = [0.0, *(at for _, at in marks)]
    return {name: 1e3 * (at - b) for (name, at), b in zip(marks, before, strict=False)}


def main() -> None:
    """Prints a table."""
    with tempfile.TemporaryDirectory() as cache:
        runs = []
        for _ in range(RUNS + 1):
            done = subprocess.run(
                [sys.executable, __file__, cache], capture_output=True, text=True, check=True
            )
            runs.append(json.loads(done.stdout))
    print(f"the first time {sum(runs[0].values()):.0f} ms; then:")
    for name in runs[0]:
        print(f"  {name:20} {statistics.median(run[name] for run in runs[1:]):6.0f}")
    print(f"  {'all':20} {statistics.median(sum(run.values()) for run in runs[1:]):6.0f}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(start(sys.argv[1])))
    else:
        main()
