"""Training steps on the CPU: time, throughput, the share of this machine's own sgemm peak; PyTorch where there is one.

    python benchmarks/bench_train_step.py [--steps 20] [--large]

The measurement is that of ``pyrformer bench train-step``; here it runs over the shapes in ``docs/performance.md``.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec

from pyrformer.bench.train_step import Shape, measure

SHAPES = [
    Shape("gpt2", 4, 128, 4, 65, 12, 64),
    Shape("gpt2", 6, 384, 6, 65, 8, 256),
    Shape("llama", 6, 384, 6, 8192, 4, 256),
    Shape("bert", 4, 256, 4, 30522, 16, 128),
]
LARGE = Shape("gpt2", 12, 768, 12, 50257, 2, 256)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--large", action="store_true", help="also the shape of GPT-2 124M")
    options = parser.parse_args()
    peer = find_spec("torch") is not None
    heads = ("batch", "ms/step", "min", "max", "tok/s", "GFLOP", "peak", "of peak", "MB", "torch ms", "ratio")
    print(f"{'shape':32}" + "".join(f"{head:>9}" for head in heads))
    for shape in SHAPES + [LARGE] * options.large:
        r = measure(shape, steps=options.steps, peer=peer)
        name = f"{shape.family} {shape.layers} L × {shape.width}, vocab {shape.vocab}"
        other = f"{r.peer['ms_per_step']:9.1f}{r.peer['speedup']:9.2f}" if r.peer else f"{'–':>9}{'–':>9}"
        print(
            f"{name:32}{f'{shape.batch}×{shape.seq}':>9}{r.ms_per_step:9.1f}{r.ms_min:9.1f}{r.ms_max:9.1f}"
            f"{r.tokens_per_s:9.0f}{r.gflop_per_step:9.2f}{r.peak_gflops:9.0f}{r.utilisation:9.2f}"
            f"{r.peak_bytes / 1e6:9.0f}{other}"
        )


if __name__ == "__main__":
    main()
