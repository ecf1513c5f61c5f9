"""Making batches: milliseconds a batch, and as a share of the training step that takes it.

    python benchmarks/bench_loader.py --text FILE [--text FILE ...] --tokenizer FOLDER [--batches 200]

Batches of 16 rows of 128 tokens, in a shuffled order, masks drawn anew: packed rows with documents kept apart, rows
that follow one another, permuted rows, and padded rows with 15 % masked. Where torch and transformers are installed, a
DataLoader with the collator for language modelling makes batches of the same kind from the same ids beside ours, in
turns of one run. The step is that of a small model of the same rows (4 layers × 128).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np

import pyrformer as pf
from pyrformer.bench.train_step import Shape, measure
from pyrformer.data.documents import read_documents, tokenize

ROWS, LENGTH = 16, 128


def ours(corpus: Any, tokenizer: pf.Tokenizer, objective: str, **options: Any) -> Iterator[object]:
    return pf.Batches(
        corpus, objective, seq_len=LENGTH, batch_size=ROWS, tokenizer=tokenizer, **options
    ).iterate(0)


def collated(corpus: Any, folder: str, masked: bool) -> Iterator[object]:
    import torch
    from transformers import AutoTokenizer, DataCollatorForLanguageModeling

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if masked:
        texts = np.split(corpus.ids, corpus.offsets[1:-1])
        rows = [
            {"input_ids": text[i : i + LENGTH].tolist()}
            for text in texts
            for i in range(0, len(text), LENGTH)
        ]
    else:
        flat = corpus.ids[: len(corpus.ids) // LENGTH * LENGTH].reshape(-1, LENGTH)
        rows = [{"input_ids": row.tolist()} for row in flat]
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=masked)
    while True:
        yield from torch.utils.data.DataLoader(rows, ROWS, shuffle=True, collate_fn=collator)


def milliseconds(batches: Iterator[object], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        next(batches)
    return 1e3 * (time.perf_counter() - start) / count


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", action="append", required=True)
    parser.add_argument(
        "--tokenizer", required=True, help="a folder of a masked model: with [CLS] and [MASK]"
    )
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--turns", type=int, default=5)
    o = parser.parse_args()
    tokenizer = pf.Tokenizer.load(o.tokenizer)
    corpus = tokenize(tokenizer, read_documents(o.text), objective="mlm")
    step = {
        f: measure(Shape(f, 4, 128, 4, 1024, ROWS, LENGTH), steps=10).ms_per_step for f in ("gpt2", "bert")
    }
    makers: dict[str, tuple[str, Callable[[], Iterator[object]]]] = {
        "packed, kept apart": ("gpt2", lambda: ours(corpus, tokenizer, "ar")),
        "packed, across": ("gpt2", lambda: ours(corpus, tokenizer, "ar", cross_documents=True)),
        "permuted": ("gpt2", lambda: ours(corpus, tokenizer, "plm")),
        "masked": ("bert", lambda: ours(corpus, tokenizer, "mlm")),
    }
    if find_spec("torch") and find_spec("transformers"):
        makers["DataLoader, across"] = ("gpt2", lambda: collated(corpus, o.tokenizer, False))
        makers["DataLoader, masked"] = ("bert", lambda: collated(corpus, o.tokenizer, True))
    running = {name: make() for name, (_, make) in makers.items()}
    found: dict[str, list[float]] = {name: [] for name in makers}
    for turn in range(o.turns + 1):
        for name, batches in running.items():
            taken = milliseconds(batches, o.batches)
            if turn:  # The first fills what is kept.
                found[name].append(taken)
    print(f"{'batches of 16 × 128':24}{'ms':>9}{'least':>9}{'most':>9}{'of a step':>12}")
    for name, taken_all in found.items():
        middle = statistics.median(taken_all)
        share = middle / step[makers[name][0]]
        print(f"{name:24}{middle:9.3f}{min(taken_all):9.3f}{max(taken_all):9.3f}{share:12.2%}")


if __name__ == "__main__":
    main()
