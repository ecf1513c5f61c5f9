"""``pyrformer tokenizer``: train vocabularies, look at what they make of a text, compare them."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

import pyrformer as pf
from pyrformer.errors import DataError, InputError

PRESETS = ["bert-uncased", "bert-cased", "multilingual", "gpt2", "llama", "xlnet", "char"]
KINDS = ["bpe", "wordpiece", "unigram", "char"]


@click.group()
def command() -> None:
    """Train a tokenizer, use one, and see how well it fits a text."""


@command.command()
@click.argument("files", nargs=-1, required=True, type=click.Path())
@click.option(
    "--out", required=True, type=click.Path(), help="The tokenizer.json to write, or an existing folder."
)
@click.option("--kind", type=click.Choice(KINDS), help="Kind of model.  [default: bpe]")
@click.option("--preset", type=click.Choice(PRESETS), help="Kind of model and treatment of text together.")
@click.option("--vocab-size", type=click.IntRange(1), default=8192, show_default=True, help="Most tokens.")
@click.option(
    "--min-frequency", type=click.IntRange(1), default=2, show_default=True, help="Of a pair to merge."
)
@click.option("--special-token", "special", multiple=True, help="Instead of the preset's; may be repeated.")
@click.option(
    "--column", default="text", show_default=True, help="The field of .jsonl lines that holds the text."
)
@click.option("--threads", type=click.IntRange(1), help="Threads to use; they do not change the result.")
@click.option("--json", "as_json", is_flag=True, help="Print what was made as JSON.")
def train(
    files: tuple[str, ...],
    out: str,
    kind: str | None,
    preset: str | None,
    vocab_size: int,
    min_frequency: int,
    special: tuple[str, ...],
    column: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Learn a vocabulary from .txt and .jsonl FILES."""
    if kind is not None and preset is not None:
        raise click.UsageError("--kind and --preset both say what to train; give one")
    if not Path(out).absolute().parent.is_dir():
        raise InputError(f"[tokenizer] there is no folder {Path(out).absolute().parent} to write into")
    start = time.perf_counter()
    with _progress() as progress, _interruptible():
        tokenizer = pf.Tokenizer.train(
            list(files),
            kind or "bpe",
            vocab_size,
            preset=preset,
            min_frequency=min_frequency,
            special_tokens=list(special) or None,
            threads=threads,
            column=column,
            progress=progress,
        )
    tokenizer.save(out)
    seconds = time.perf_counter() - start
    report = {
        "out": out,
        "kind": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
        "seconds": round(seconds, 3),
    }
    if as_json:
        click.echo(json.dumps(report))
    else:
        click.echo(f"{tokenizer.kind} of {tokenizer.vocab_size:,} tokens in {seconds:.1f} s: {out}")


@command.command()
@click.argument("tokenizer", type=click.Path())
@click.argument("text")
@click.option("--no-special", is_flag=True, help="Without the special tokens of the template.")
@click.option("--tokens", "as_tokens", is_flag=True, help="Print the tokens' strings instead of ids.")
@click.option("--json", "as_json", is_flag=True, help="Print ids, tokens and offsets as JSON.")
def encode(tokenizer: str, text: str, no_special: bool, as_tokens: bool, as_json: bool) -> None:
    """Print the ids of TEXT ("-": of standard input)."""
    e = pf.Tokenizer.load(tokenizer).encode(_given(text), add_special_tokens=not no_special)
    if as_json:
        click.echo(json.dumps({"ids": e.ids, "tokens": e.tokens, "offsets": e.offsets}, ensure_ascii=False))
    else:
        click.echo(" ".join(e.tokens if as_tokens else map(str, e.ids)))


@command.command()
@click.argument("tokenizer", type=click.Path())
@click.argument("ids", nargs=-1, required=True)
@click.option("--keep-special", is_flag=True, help="Show special tokens.")
@click.option("--json", "as_json", is_flag=True, help="Print the text as a JSON string.")
def decode(tokenizer: str, ids: tuple[str, ...], keep_special: bool, as_json: bool) -> None:
    """Print the text of IDS ("-": of numbers on standard input)."""
    words = _given("-").split() if ids == ("-",) else list(ids)
    strange = next((word for word in words if not word.isdecimal()), None)
    if strange is not None:
        raise InputError(f"[tokenizer] {strange!r} is no id; give numbers with spaces between")
    text = pf.Tokenizer.load(tokenizer).decode(map(int, words), skip_special_tokens=not keep_special)
    click.echo(json.dumps(text, ensure_ascii=False) if as_json else text)


@command.command()
@click.argument("tokenizer", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(tokenizer: str, as_json: bool) -> None:
    """Say what kind of tokenizer this is, on which path it runs and why, and its special tokens."""
    start = time.perf_counter()
    loaded = pf.Tokenizer.load(tokenizer)
    seconds = time.perf_counter() - start
    special = {i: loaded.id_to_token(i) for i in range(loaded.vocab_size) if loaded.is_special(i)}
    if as_json:
        report = {"kind": loaded.kind, "vocab_size": loaded.vocab_size, "load_seconds": round(seconds, 4)}
        report["fallback"] = loaded.fallback
        click.echo(json.dumps({**report, "special_tokens": special}, ensure_ascii=False))
        return
    click.echo(f"{loaded.kind} of {loaded.vocab_size:,} tokens, loaded in {1000 * seconds:.0f} ms")
    if loaded.fallback is None:
        click.echo("runs on the fast path")
    else:
        click.echo("runs on the tokenizers library (the same ids, slower), as the fast path does not know")
        click.echo(f"  {loaded.fallback if len(loaded.fallback) <= 200 else loaded.fallback[:199] + '…'}")
    for i, token in special.items():
        click.echo(f"{i:>8}  {token}")


@command.command()
@click.argument("tokenizers", nargs=-1, required=True, type=click.Path())
@click.option(
    "--text", "files", multiple=True, required=True, type=click.Path(), help="A text; may be repeated."
)
@click.option("--by", help="Group .jsonl lines by this field, as a language, instead of by file.")
@click.option(
    "--column", default="text", show_default=True, help="The field of .jsonl lines that holds the text."
)
@click.option("--threads", type=click.IntRange(1), help="Threads to use.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def compare(
    tokenizers: tuple[str, ...],
    files: tuple[str, ...],
    by: str | None,
    column: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure TOKENIZERS on texts: bytes per token (more is shorter), unknown tokens, and time, for each text."""
    groups = _groups(files, by, column)
    rows = []
    for path in tokenizers:
        tokenizer = pf.Tokenizer.load(path).without_truncation()
        for group, texts in groups.items():
            start = time.perf_counter()
            ids = tokenizer.encode_batch(texts, add_special_tokens=False, threads=threads).ids
            seconds = time.perf_counter() - start
            n_bytes = sum(len(text.encode()) for text in texts)
            unknown = 0 if tokenizer.unk_token_id is None else int((ids == tokenizer.unk_token_id).sum())
            rows.append(
                {
                    "tokenizer": path,
                    "text": group,
                    "bytes": n_bytes,
                    "tokens": len(ids),
                    "bytes_per_token": round(n_bytes / max(len(ids), 1), 4),
                    "unknown_rate": round(unknown / max(len(ids), 1), 6),
                    "mb_per_s": round(n_bytes / 1e6 / max(seconds, 1e-9), 2),
                }
            )
    if as_json:
        click.echo(json.dumps(rows, ensure_ascii=False))
    else:
        _table(rows)


def _table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    out = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("text", "bytes", "tokenizer", "tokens", "bytes/token", "unknown", "MB/s"):
        out.add_column(name, justify="left" if name in ("tokenizer", "text") else "right", overflow="fold")
    texts, names = _tails([row["text"] for row in rows]), _tails([row["tokenizer"] for row in rows])
    order = list(texts)
    before = None
    # The tokenizers of one text stand together, below its name.
    for row in sorted(rows, key=lambda row: order.index(row["text"])):
        first, before = row["text"] != before, row["text"]
        out.add_row(
            texts[row["text"]] if first else "",
            f"{row['bytes']:,}" if first else "",
            names[row["tokenizer"]],
            f"{row['tokens']:,}",
            f"{row['bytes_per_token']:.3f}",
            f"{row['unknown_rate']:.3%}",
            f"{row['mb_per_s']:.1f}",
        )
    # Piped output is not cut to a terminal's width.
    Console(highlight=False, width=None if sys.stdout.isatty() else 240).print(out)


def _tails(paths: list[str]) -> dict[str, str]:
    """As much of the ends of paths as tells them apart."""
    folders = {path: Path(path).parent if Path(path).name == "tokenizer.json" else path for path in paths}
    parts = {path: Path(folder).parts or (path,) for path, folder in folders.items()}
    n = 1
    while n < max(map(len, parts.values())) and len({p[-n:] for p in parts.values()}) < len(parts):
        n += 1
    return {path: str(Path(*p[-n:])) for path, p in parts.items()}


def _groups(files: tuple[str, ...], by: str | None, column: str) -> dict[str, list[str]]:
    """Texts by file, or by field ``by`` of the lines of ``.jsonl`` files."""
    from pyrformer.data.documents import read_documents

    if by is None:
        return {file: read_documents([file], column=column) for file in files}
    groups: dict[str, list[str]] = {}
    for file in files:
        names = read_documents([file], column=by)
        texts = read_documents([file], column=column)
        if len(names) != len(texts):
            raise DataError(f"[data] {file}: {len(names)} lines have a field {by!r} and {len(texts)} a text")
        for name, text in zip(names, texts, strict=True):
            groups.setdefault(name, []).append(text)
    return dict(sorted(groups.items()))


def _given(text: str) -> str:
    if text != "-":
        return text
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as e:
        raise DataError(f"[data] standard input is not UTF-8 at byte {e.start}") from None


@contextmanager
def _interruptible() -> Iterator[None]:
    """Lets Ctrl-C end the process at once: Python's own handler would wait for the core to return."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _progress() -> Iterator[Any]:
    """A bar with the time left for each stage, in a terminal only."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def tell(stage: str, done: int, total: int) -> None:
            task = tasks.setdefault(stage, None)
            if task is None:
                task = tasks[stage] = bar.add_task(stage, total=total)
            bar.update(task, completed=done, total=total)

        yield tell
