"""Tokenizers beside their peers, in one run: encoding, loading and training.

    python benchmarks/bench_tokenizers.py --tokenizer FOLDER [--tokenizer FOLDER ...] --text FILE [--text FILE ...]
        [--repeats 5] [--train bpe wordpiece unigram]

Every peer that is installed (``tokenizers``, ``tokie``; ``tiktoken`` with cl100k's split for folders with a
``.tiktoken`` file only) encodes the same documents turn by turn, on all cores; what is timed ends with the ids at hand.
Medians with minimum and maximum; ids are compared with those of ``tokenizers`` first. Training times each library once.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyrformer as pf
from pyrformer.data import read_documents


def documents(files: list[str]) -> list[str]:
    """Pieces of some kilobytes, cut at empty lines."""
    out: list[str] = []
    for document in read_documents(files):
        part = ""
        for paragraph in document.split("\n\n"):
            part += paragraph + "\n\n"
            if len(part) > 4000:
                out.append(part)
                part = ""
        out.append(part)
    return [d for d in out if d]


def peers(folder: Path, texts: list[str]) -> dict[str, Callable[[], Any]]:
    """Name → a call that encodes all texts."""
    ours = pf.Tokenizer.load(folder)
    calls: dict[str, Callable[[], Any]] = {
        "pyrformer": lambda: ours.encode_batch(texts, add_special_tokens=False).ids
    }
    file = folder / "tokenizer.json"
    if file.is_file():
        try:
            import tokenizers

            theirs = tokenizers.Tokenizer.from_file(str(file))
            theirs.no_padding()
            theirs.no_truncation()
            calls["tokenizers"] = lambda: theirs.encode_batch_fast(texts, add_special_tokens=False)
            expected = [i for e in theirs.encode_batch(texts, add_special_tokens=False) for i in e.ids]
            if calls["pyrformer"]().tolist() != expected:
                print(f"{folder.name}: the ids are not those of tokenizers (or the file truncates)")
        except ImportError:
            print("tokenizers is not installed")
        try:
            import tokie

            quick = tokie.Tokenizer.from_json(str(file))
            quick.no_padding()
            quick.no_truncation()
            calls["tokie"] = lambda: quick.encode_batch_flat(texts, add_special_tokens=False)
        except ImportError:
            print("tokie is not installed")
    for ranks in () if file.is_file() else folder.glob("*.tiktoken"):
        try:
            import tiktoken
            from tiktoken.load import load_tiktoken_bpe

            # cl100k's.
            pattern = (
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+"
            )
            encoding = tiktoken.Encoding(
                "x", pat_str=pattern, mergeable_ranks=load_tiktoken_bpe(str(ranks)), special_tokens={}
            )
            calls["tiktoken"] = partial(encoding.encode_ordinary_batch, texts)
        except ImportError:
            print("tiktoken is not installed")
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", action="append", default=[])
    parser.add_argument("--text", action="append", required=True)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--train", nargs="*", default=[], choices=["bpe", "wordpiece", "unigram"])
    args = parser.parse_args()
    texts = documents(args.text)
    size = sum(len(t.encode()) for t in texts) / 1e6
    print(f"{size:.1f} MB in {len(texts):,} documents")
    print(f"{'tokenizer':<16} {'library':<12} {'MB/s':>8} {'least':>8} {'most':>8}")
    for folder in map(Path, args.tokenizer):
        start = time.perf_counter()
        pf.Tokenizer.load(folder)
        loading = time.perf_counter() - start
        calls = peers(folder, texts)
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(args.repeats):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
        for name, seconds in times.items():
            speeds = [size / s for s in seconds]
            median = statistics.median(speeds)
            print(f"{folder.name:<16} {name:<12} {median:8.1f} {min(speeds):8.1f} {max(speeds):8.1f}")
        print(f"{folder.name:<16} loaded in {1000 * loading:.0f} ms")
    for kind in args.train:
        train(kind, texts)


def train(kind: str, texts: list[str]) -> None:
    """One training of each library, vocabulary 8,192."""
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
    theirs = time.perf_counter() - start
    print(f"train {kind:<10} pyrformer {ours:.2f} s, tokenizers {theirs:.2f} s, {theirs / ours:.1f}×")


if __name__ == "__main__":
    main()
