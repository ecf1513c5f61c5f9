"""Training steps on the CPU: time, throughput, and the share of this machine's own sgemm peak.

    python benchmarks/bench_train_step.py [--steps 20] [--large]

One step is one plan: forward, loss, backward, clipping, AdamW, on random tokens of a freshly made model. The peak is
the best NumPy matrix product of the same run, on as many threads. Medians with minimum and maximum.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np

from pyrformer import programs
from pyrformer.model import Model
from pyrformer.programs import AdamW, Sizes

NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
BERT_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
#: Name, config.json, batch, tokens, whether it belongs to --large only.
SHAPES = [
    ("GPT 4 L × 128, vocab 65", {"n_layer": 4, "n_embd": 128, "n_head": 4, "vocab_size": 65}, 12, 64, False),
    ("GPT 6 L × 384, vocab 65", {"n_layer": 6, "n_embd": 384, "n_head": 6, "vocab_size": 65}, 8, 256, False),
    (
        "GPT-2 12 L × 768, vocab 50257",
        {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257},
        2,
        256,
        True,
    ),
    (
        "BERT 4 L × 256, vocab 30522",
        {
            "num_hidden_layers": 4,
            "hidden_size": 256,
            "num_attention_heads": 4,
            "intermediate_size": 1024,
            "vocab_size": 30522,
        },
        16,
        128,
        False,
    ),
]


def median(run: Callable[[], object], times: int) -> tuple[float, float, float]:
    """Median, minimum and maximum of a call in seconds, after one that is not counted."""
    run()
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds)), min(seconds), max(seconds)


def sgemm_peak() -> float:
    """The best FLOP/s of NumPy's float32 matrix product of 1536 × 1536."""
    a, b = np.ones((2, 1536, 1536), np.float32)
    return 2 * 1536**3 / median(lambda: a @ b, 8)[1]


def step_of(
    fields: dict[str, object], batch: int, tokens: int
) -> tuple[Callable[[], object], programs.Traced]:
    """A training step ready to run, and its program."""
    rng = np.random.default_rng(0)
    vocab = int(fields["vocab_size"])  # type: ignore[call-overload]
    if "n_layer" in fields:
        model = Model.from_config({"model_type": "gpt2", "n_positions": tokens, **NO_DROPOUT, **fields})
    else:
        model = Model.from_config({"model_type": "bert", **BERT_NO_DROPOUT, **fields})
    ids = rng.integers(0, vocab, (batch, tokens))
    labels = ids if "n_layer" in fields else np.where(rng.random(ids.shape) < 0.15, ids, -100)
    ready = model.batch(ids, labels=labels)
    traced = programs.train_step(model.family, Sizes(batch, tokens, ready.sizes.labelled), AdamW())
    compiled = traced.lower().compile(model.store)
    scale = 1.0 / ready.labels
    return lambda: compiled(**ready.arrays, loss_scale=scale, lr=1e-4, step=1), traced


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--large", action="store_true", help="also the shape of GPT-2 124M")
    options = parser.parse_args()
    peak = sgemm_peak()
    print(f"sgemm peak (NumPy, this run): {peak / 1e9:.0f} GFLOP/s\n")
    heads = ("batch", "ms/step", "min", "max", "tok/s", "GFLOP", "of peak", "arena")
    print(f"{'shape':32}" + "".join(f"{head:>9}" for head in heads))
    for name, fields, batch, tokens, large in SHAPES:
        if large and not options.large:
            continue
        run, traced = step_of(fields, batch, tokens)
        plan = traced.lower().plan
        mid, low, high = median(run, options.steps)
        share = plan.flops / mid / peak
        arena = f"{plan.arena_bytes / 1e6:.0f} MB"
        print(
            f"{name:32}{f'{batch}×{tokens}':>9}{mid * 1e3:9.1f}{low * 1e3:9.1f}{high * 1e3:9.1f}"
            f"{batch * tokens / mid:9.0f}{plan.flops / 1e9:9.2f}{share:9.2f}{arena:>9}"
        )


if __name__ == "__main__":
    main()
