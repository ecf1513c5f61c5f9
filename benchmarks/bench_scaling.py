"""How a training step grows with threads, the length of texts and the width of the model.

    python benchmarks/bench_scaling.py [--steps 5] [--out benchmarks/scaling.svg]

One size changes at a time, from a GPT of 4 layers × 256 on 8 × 256 tokens; the number of tokens in a step stays the
same. Beside the time stand the step's arithmetic and that of attention alone, from the plan: only the latter grows with
the square of the length. Plots need matplotlib (`pip install matplotlib`); the table does not.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pyrformer.bench.train_step import Result, Shape, measure

BASE = Shape(family="gpt2", layers=4, width=256, heads=4, vocab=512, batch=8, seq=256)
TOKENS = BASE.batch * BASE.seq
LENGTHS = [32, 64, 128, 256, 512, 1024, 2048]
WIDTHS = [64, 128, 256, 384, 512, 768]


def lengths() -> Iterable[tuple[int, Shape]]:
    for seq in LENGTHS:
        yield seq, replace(BASE, seq=seq, batch=TOKENS // seq)


def widths() -> Iterable[tuple[int, Shape]]:
    for width in WIDTHS:
        yield width, replace(BASE, width=width, heads=max(1, width // 64))


def quadratic(result: Result) -> float:
    """GFLOP of attention in a step."""
    return sum(o.gflop for o in result.operations if o.name.startswith("attention"))


def row(size: int, result: Result) -> dict[str, float]:
    print(
        f"{size:>8}{result.ms_per_step:>10.1f}{result.tokens_per_s:>12,.0f}{result.gflop_per_step:>10.1f}"
        f"{quadratic(result):>12.2f}{result.utilisation:>13.2f}{result.arena_bytes / 1e6:>11.1f}",
        flush=True,
    )
    return {
        "size": size,
        "tokens/s": result.tokens_per_s,
        "utilisation": result.utilisation,
        "ms": result.ms_per_step,
        "arena": result.arena_bytes / 1e6,
    }


def table(title: str) -> None:
    print(f"\n{title}")
    print(
        f"{'':8}{'ms/step':>10}{'tokens/s':>12}{'GFLOP':>10}{'attention':>12}{'utilisation':>13}{'arena MB':>11}"
    )


def plot(found: dict[str, list[dict[str, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(found), figsize=(4 * len(found), 3.2), layout="constrained")
    for ax, (title, rows) in zip(axes, found.items(), strict=True):
        ax.plot([r["size"] for r in rows], [r["tokens/s"] for r in rows], "o-")
        ax.set(title=title, ylabel="tokens/s", ylim=(0, None), xscale="log", xticks=[r["size"] for r in rows])
        ax.set_xticklabels([f"{r['size']:.0f}" for r in rows], fontsize=8)
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path, help="also draw the curves into this SVG file")
    o = parser.parse_args()
    if o.out and not find_spec("matplotlib"):
        parser.error("--out needs matplotlib: pip install matplotlib")
    options: dict[str, Any] = {"steps": o.steps, "profile": True}
    found: dict[str, list[dict[str, float]]] = {}
    table("threads")
    found["threads"] = [
        row(n, measure(BASE, threads=n, **options)) for n in range(1, len(os.sched_getaffinity(0)) + 1)
    ]
    table(f"length of texts, {TOKENS} tokens a step")
    found["length of texts"] = [row(n, measure(shape, **options)) for n, shape in lengths()]
    table("width")
    found["width"] = [row(n, measure(shape, **options)) for n, shape in widths()]
    if o.out:
        plot(found, o.out)


if __name__ == "__main__":
    main()
