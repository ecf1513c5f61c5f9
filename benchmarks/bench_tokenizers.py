"""Tokenizers beside their peers, in one run: encoding, loading and training.

    python benchmarks/bench_tokenizers.py --tokenizer FOLDER [--tokenizer FOLDER ...] --text FILE [--text FILE ...]
        [--repeats 5] [--train bpe wordpiece unigram]

Every peer that is installed (``tokenizers``, ``tokie``; ``tiktoken`` with cl100k's split for folders with a
``.tiktoken`` file only) loads the same file and encodes the same documents turn by turn, on all cores; what is timed
ends with the ids at hand. Medians with minimum and maximum; ids are compared with those of the peer first. Training
times each library once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyrformer as pf
from pyrformer.data.documents import read_documents


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
    head = f"{'tokenizer':<12} {'library':<11} {'MB/s':>8} {'least':>8} {'most':>8} {'load ms':>8}"
    print(head)
    for folder in map(Path, args.tokenizer):
        loads, calls = peers(folder, texts)
        loading, encoding = timed(loads, args.repeats), timed(calls, args.repeats)
        for name, seconds in encoding.items():
            speeds = [size / s for s in seconds]
            median, load = statistics.median(speeds), 1000 * statistics.median(loading[name])
            row = f"{folder.name:<12} {name:<11} {median:8.1f} {min(speeds):8.1f} {max(speeds):8.1f} {load:8.0f}"
            print(row, flush=True)
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
