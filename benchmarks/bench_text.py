"""From text to batches beside peers, in one run: training of tokenizers, encoding, `prepare`, batches.

    python benchmarks/bench_text.py CORPORA --tokenizers FOLDERS [--tokenizer bert] [--megabytes 20] [--out table.md]

CORPORA holds a folder of text for each corpus (``english``, ``multilingual``, ``docs``: ``*.txt`` or ``*.jsonl``), of
which the first megabytes are taken, as much of each file. FOLDERS holds tokenizers in folders: ``tokenizer.json``, or
the ranks of cl100k as ``*.tiktoken``. Peers that are installed load the same file and get the same documents, in turns,
on all cores: ``tokenizers``, ``tokie``, ``tiktoken``; for batches PyTorch's DataLoader with the collator of
``transformers``. What is timed ends with the ids at hand, or in a file. Ids are compared with those of the peer first.
The table is Markdown: medians (least to most). Training times each library once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

import pyrformer as pf
from pyrformer.bench.train_step import Shape, measure
from pyrformer.data.documents import read_documents, tokenize

#: Rows and tokens of a batch.
ROWS, LENGTH = 16, 128
KINDS = ("bpe", "wordpiece", "unigram")


def documents(corpus: Path, megabytes: float) -> list[str]:
    """Pieces of some kilobytes, cut at empty lines: as many bytes of each file."""
    files = sorted(corpus.glob("*.jsonl")) or sorted(corpus.glob("*.txt"))
    if not files:
        sys.exit(f"{corpus} holds neither .jsonl nor .txt files")
    out: list[str] = []
    for file in files:
        left = megabytes * 1e6 / len(files)
        for document in read_documents([str(file)]):
            part = ""
            for paragraph in document.split("\n\n"):
                part += paragraph + "\n\n"
                if len(part) > 4000:
                    out.append(part)
                    left -= len(part.encode())
                    part = ""
                if left <= 0:
                    break
            if left <= 0:
                break
            if part:
                out.append(part)
                left -= len(part.encode())
    return out


#: Name → a call.
Calls = dict[str, Callable[[], Any]]


def peers(folder: Path, texts: list[str]) -> tuple[Calls, Calls]:
    """Calls that load the tokenizer, and calls that encode all texts."""
    file = folder / "tokenizer.json"
    ours = pf.Tokenizer.load(whole(file)) if file.is_file() else pf.Tokenizer.load(folder)
    loads: Calls = {"pyrformer": lambda: pf.Tokenizer.load(folder)}
    calls: Calls = {"pyrformer": lambda: ours.encode_batch(texts, add_special_tokens=False).ids}
    if file.is_file():
        try:
            import tokenizers

            theirs = tokenizers.Tokenizer.from_file(str(file))
            theirs.no_padding()
            theirs.no_truncation()
            loads["tokenizers"] = lambda: tokenizers.Tokenizer.from_file(str(file))
            calls["tokenizers"] = lambda: theirs.encode_batch_fast(texts, add_special_tokens=False)
            expected = [i for e in theirs.encode_batch(texts, add_special_tokens=False) for i in e.ids]
            if calls["pyrformer"]().tolist() != expected:
                print(f"{folder.name}: the ids are not those of tokenizers")
        except ImportError:
            print("tokenizers is not installed")
        try:
            import tokie

            quick = tokie.Tokenizer.from_json(str(file))
            quick.no_padding()
            quick.no_truncation()
            loads["tokie"] = lambda: tokie.Tokenizer.from_json(str(file))
            calls["tokie"] = lambda: quick.encode_batch_flat(texts, add_special_tokens=False)
        except ImportError:
            print("tokie is not installed")
    for ranks in () if file.is_file() else folder.glob("*.tiktoken"):
        try:
            import tiktoken  # noqa: F401

            # cl100k's.
            pattern = (
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+"
            )
            load = partial(load_tiktoken, str(ranks), pattern)
            loads["tiktoken"] = load
            encode = load().encode_ordinary_batch
            if calls["pyrformer"]().tolist() != [i for ids in encode(texts) for i in ids]:
                print(f"{folder.name}: the ids are not those of tiktoken (is the split cl100k's?)")
            calls["tiktoken"] = partial(encode, texts)
        except ImportError:
            print("tiktoken is not installed")
    return loads, calls


def whole(file: Path) -> Path:
    """A copy of a tokenizer.json that neither truncates nor pads."""
    contents = {**json.loads(file.read_text(encoding="utf-8")), "truncation": None, "padding": None}
    copy = Path(tempfile.mkdtemp()) / file.name
    copy.write_text(json.dumps(contents, ensure_ascii=False), encoding="utf-8")
    return copy


def load_tiktoken(file: str, pattern: str) -> Any:
    import tiktoken
    from tiktoken.load import load_tiktoken_bpe

    ranks = load_tiktoken_bpe(file)
    return tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


def timed(calls: Calls, repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, taken turn by turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return times


def range_of(values: list[float], digits: int = 1) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


class Table:
    """Rows of Markdown, shown as they come."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)
        print(text, flush=True)

    def head(self, title: str, *columns: str) -> None:
        self.line(f"\n{title}\n\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")

    def row(self, *cells: str) -> None:
        self.line(f"| {' | '.join(cells)} |")


def encoding(table: Table, corpora: dict[str, list[str]], folders: list[Path], repeats: int) -> None:
    names = ["pyrformer", "tokenizers", "tokie", "tiktoken"]
    table.head("Encoding, MB/s; the time to load, ms", "vocabulary", "corpus", *names)
    for folder in folders:
        for corpus, texts in corpora.items():
            loads, calls = peers(folder, texts)
            loading, seconds = timed(loads, repeats), timed(calls, repeats)
            size = bytes_of(texts) / 1e6
            cells = [
                f"{range_of([size / s for s in seconds[name]])}, {1e3 * statistics.median(loading[name]):.0f} ms"
                if name in seconds
                else ""
                for name in names
            ]
            table.row(folder.name, corpus, *cells)


def bytes_of(texts: list[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def training(table: Table, corpora: dict[str, list[str]], kinds: list[str]) -> None:
    table.head(
        "Training a vocabulary of 8,192, seconds",
        "kind",
        "corpus",
        "pyrformer",
        "tokenizers",
        "times as fast",
    )
    for kind in kinds:
        for corpus, texts in corpora.items():
            ours, theirs = train(kind, texts)
            table.row(kind, corpus, f"{ours:.2f}", f"{theirs:.2f}", f"{theirs / ours:.1f}")


def train(kind: str, texts: list[str]) -> tuple[float, float]:
    """Seconds of one training of each library, vocabulary 8,192."""
    import tokenizers as hf
    from tokenizers import models, normalizers, pre_tokenizers, trainers

    start = time.perf_counter()
    pf.Tokenizer.train(iter(texts), kind, 8192)
    ours = time.perf_counter() - start
    common = {"vocab_size": 8192, "show_progress": False}
    if kind == "bpe":
        peer = hf.Tokenizer(models.BPE())
        peer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(min_frequency=2, **common)
    elif kind == "wordpiece":
        peer = hf.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        peer.normalizer = normalizers.BertNormalizer()
        peer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(
            min_frequency=2, limit_alphabet=1000, special_tokens=["[UNK]"], **common
        )
    else:
        peer = hf.Tokenizer(models.Unigram())
        peer.normalizer = normalizers.NFKC()
        peer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
        )
        trainer = trainers.UnigramTrainer(unk_token="<unk>", special_tokens=["<unk>"], **common)
    start = time.perf_counter()
    peer.train_from_iterator(texts, trainer)
    return ours, time.perf_counter() - start


def preparing(table: Table, corpora: dict[str, list[str]], folder: Path, repeats: int) -> None:
    """`prepare`, with checksums, index and manifest, beside the least that does: ids appended to a file."""
    import tokenizers as hf

    file = whole(folder / "tokenizer.json")
    tokenizer, peer = pf.Tokenizer.load(file), hf.Tokenizer.from_file(str(file))
    table.head(f"Text to a file of ids ({folder.name}), MB/s", "corpus", "pf.prepare", "tokenizers and NumPy")
    for corpus, texts in corpora.items():
        with tempfile.TemporaryDirectory() as work:
            turn = iter(range(1 << 30))

            def ours(texts: list[str] = texts, work: str = work, turn: Iterator[int] = turn) -> object:
                return pf.prepare(iter(texts), f"{work}/{next(turn)}", tokenizer)

            def theirs(texts: list[str] = texts, work: str = work, turn: Iterator[int] = turn) -> None:
                rest = iter(texts)
                with open(f"{work}/{next(turn)}", "wb") as to:
                    while part := list(islice(rest, 1000)):
                        found = peer.encode_batch_fast(part, add_special_tokens=False)
                        np.concatenate([np.array(e.ids, np.uint16) for e in found]).tofile(to)

            seconds = timed({"ours": ours, "theirs": theirs}, repeats)
        size = bytes_of(texts) / 1e6
        table.row(corpus, *(range_of([size / s for s in taken]) for taken in seconds.values()))


def made(corpus: Any, tokenizer: pf.Tokenizer, objective: str, **options: Any) -> Iterator[object]:
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


def batches(table: Table, texts: list[str], folder: Path, repeats: int, count: int = 200) -> None:
    """Batches in a shuffled order, masks drawn anew; the step is that of 4 layers × 128 of the same rows."""
    tokenizer = pf.Tokenizer.load(folder)
    corpus = tokenize(tokenizer, iter(texts), objective="mlm")
    step = {
        f: measure(Shape(f, 4, 128, 4, 1024, ROWS, LENGTH), steps=10).ms_per_step for f in ("gpt2", "bert")
    }
    makers: dict[str, tuple[str, Callable[[], Iterator[object]]]] = {
        "packed, documents kept apart": ("gpt2", lambda: made(corpus, tokenizer, "ar")),
        "packed, across documents": ("gpt2", lambda: made(corpus, tokenizer, "ar", cross_documents=True)),
        "permuted": ("gpt2", lambda: made(corpus, tokenizer, "plm")),
        "masked": ("bert", lambda: made(corpus, tokenizer, "mlm")),
    }
    if find_spec("torch") and find_spec("transformers"):
        makers["DataLoader, across documents"] = ("gpt2", lambda: collated(corpus, str(folder), False))
        makers["DataLoader, masked"] = ("bert", lambda: collated(corpus, str(folder), True))
    running = {name: make() for name, (_, make) in makers.items()}
    found: dict[str, list[float]] = {name: [] for name in makers}
    for turn in range(repeats + 1):
        for name, iterator in running.items():
            taken = milliseconds(iterator, count)
            if turn:  # The first fills what is kept.
                found[name].append(taken)
    table.head(
        f"Batches of {ROWS} × {LENGTH} ({folder.name}), one thread", "batches", "ms", "of a training step"
    )
    for name, taken_all in found.items():
        share = statistics.median(taken_all) / step[makers[name][0]]
        table.row(name, range_of(taken_all, 3), f"{share:.2%}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpora", type=Path)
    parser.add_argument("--tokenizers", type=Path, required=True, help="a folder of folders")
    parser.add_argument(
        "--tokenizer", default="bert", help="the one for prepare and batches: with [CLS] and [MASK]"
    )
    parser.add_argument("--corpus", nargs="*", default=["english", "multilingual", "docs"])
    parser.add_argument("--megabytes", type=float, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--train", nargs="*", default=list(KINDS), choices=KINDS)
    parser.add_argument("--out", type=Path, help="a file for the table")
    o = parser.parse_args()
    corpora = {name: documents(o.corpora / name, o.megabytes) for name in o.corpus}
    folders = [f for f in sorted(o.tokenizers.iterdir()) if f.is_dir()]
    table = Table()
    sizes = ", ".join(
        f"{name} {bytes_of(t) / 1e6:.1f} MB in {len(t):,} documents" for name, t in corpora.items()
    )
    table.line(sizes)
    encoding(table, corpora, folders, o.repeats)
    preparing(table, corpora, o.tokenizers / o.tokenizer, o.repeats)
    batches(table, corpora[o.corpus[-1]], o.tokenizers / o.tokenizer, o.repeats)
    training(table, corpora, o.train)
    if o.out:
        o.out.write_text("\n".join(table.lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
