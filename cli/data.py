"""``pyrformer data``: what text holds, and what its batches look like."""

from __future__ import annotations

import json
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

import pyrformer as pf
from pyrformer.errors import InputError
from pyrformer.prepared import is_prepared

#: Colours of the documents in a row, in turn.
DOCUMENTS = ("cyan", "green", "magenta", "blue")


@click.group()
def command() -> None:
    """Look at text and at the batches made of it."""


@command.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path())
@click.option("--column", default="text", show_default=True, help="Field or column that holds the text.")
@click.option("--clean", multiple=True, help="A cleaning step to try; may be given again.")
@click.option("--tokenizer", type=click.Path(), help="Count the tokens of this tokenizer, too.")
@click.option("--verify", is_flag=True, help="Compare the shards of a prepared folder with their checksums.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(
    paths: tuple[str, ...],
    column: str,
    clean: tuple[str, ...],
    tokenizer: str | None,
    verify: bool,
    as_json: bool,
) -> None:
    """Count what is in text files, or in a folder that `pyrformer prepare` wrote."""
    if any(map(is_prepared, paths)):
        if len(paths) > 1 or clean or tokenizer:
            raise InputError("[data] a prepared folder is looked at alone, without --clean and --tokenizer")
        report = _prepared_report(paths[0], verify)
    else:
        report = _text_report(paths, column, clean, tokenizer)
    if as_json:
        click.echo(json.dumps(report, ensure_ascii=False))
        return
    width = max(map(len, report))
    for name, value in report.items():
        shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
        click.echo(f"{name.replace('_', ' '):<{width}}  {shown}")


def _prepared_report(path: str, verify: bool) -> dict[str, Any]:
    found = pf.Prepared.open(path, verify=verify)
    manifest = found.manifest
    return {
        "folder": path,
        "sources": len(manifest["sources"]),
        "documents": found.corpus.documents,
        "tokens": found.corpus.tokens,
        "tokens_per_document": round(found.corpus.tokens / max(1, found.corpus.documents), 1),
        "shards": len(manifest["shards"]),
        "bytes": sum(shard["bytes"] for shard in manifest["shards"]),
        "vocab_size": found.tokenizer.vocab_size,
        "objective": manifest["options"].get("objective"),
        "clean": ", ".join(manifest["options"].get("clean", [])) or "nothing",
        "rejected": manifest.get("rejected", 0),
        "sha256": found.sha256,
        "checksums": "equal" if verify else "not compared (--verify compares them)",
    }


def _text_report(
    paths: tuple[str, ...], column: str, clean: tuple[str, ...], tokenizer: str | None
) -> dict[str, Any]:
    loaded = pf.Tokenizer.load(tokenizer) if tokenizer else None
    documents = pf.Documents(list(paths), column=column, clean=clean)
    count = characters = size = tokens = longest = 0
    shortest: int | None = None
    for chunk in documents.chunks():
        cleaned = documents.clean(chunk)
        lengths = [len(text) for text in cleaned]
        count += len(cleaned)
        characters += sum(lengths)
        size += sum(len(text.encode()) for text in cleaned)
        if lengths:
            longest = max(longest, *lengths)
            shortest = min(lengths) if shortest is None else min(shortest, *lengths)
        if loaded is not None:
            tokens += len(loaded.encode_batch(cleaned, add_special_tokens=False).ids)
    report: dict[str, Any] = {
        "documents": count,
        "characters": characters,
        "bytes": size,
        "characters_of_the_shortest": shortest or 0,
        "characters_of_the_longest": longest,
        "characters_of_the_mean": round(characters / max(1, count), 1),
    }
    if loaded is not None:
        report |= {"tokens": tokens, "bytes_per_token": round(size / max(1, tokens), 3)}
    for step in documents.report:
        report[f"clean {step.step}"] = (
            f"{step.documents_changed:,} changed, {step.documents_dropped:,} dropped, "
            f"{step.characters_removed:,} characters removed"
        )
    return report


@command.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path())
@click.option("--tokenizer", type=click.Path(), help="For text files: the tokenizer to use.")
@click.option("--objective", type=click.Choice(["ar", "mlm"]), default="ar", show_default=True)
@click.option("--step", type=click.IntRange(0), default=0, show_default=True, help="Which batch.")
@click.option("--seq-len", type=click.IntRange(1), default=64, show_default=True, help="Tokens in a row.")
@click.option("--batch-size", type=click.IntRange(1), default=4, show_default=True, help="Rows in a batch.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of order and masks.")
@click.option("--column", default="text", show_default=True, help="Field or column that holds the text.")
@click.option("--clean", multiple=True, help="A cleaning step; may be given again.")
@click.option(
    "--mlm-probability", type=float, default=0.15, show_default=True, help="Share of masked tokens."
)
@click.option("--whole-word-mask", is_flag=True, help="Mask words, not tokens.")
@click.option("--span-p", type=float, default=0.0, help="Mask runs of words; p of their geometric lengths.")
@click.option(
    "--span-max-length", type=int, default=10, show_default=True, help="The greatest length of a run."
)
@click.option("--json", "as_json", is_flag=True, help="Print the arrays as JSON.")
def show(
    paths: tuple[str, ...],
    tokenizer: str | None,
    objective: str,
    step: int,
    seq_len: int,
    batch_size: int,
    seed: int,
    column: str,
    clean: tuple[str, ...],
    mlm_probability: float,
    whole_word_mask: bool,
    span_p: float,
    span_max_length: int,
    as_json: bool,
) -> None:
    """Print the batch of a step: its tokens, masks and documents.

    PATHS are text files (with --tokenizer), or one folder that `pyrformer prepare` wrote. Tokens that a document begins
    with change the colour; the ones to predict are underlined, with what is hidden behind them in brackets.
    """
    from pyrformer.data import Masking, read_documents, tokenize

    if any(map(is_prepared, paths)):
        found = pf.Prepared.open(paths[0])
        loaded = found.tokenizer
        corpus: Any = found.corpus
        objective = str(found.manifest["options"].get("objective", objective))
    elif tokenizer is None:
        raise click.UsageError("text files need --tokenizer")
    else:
        loaded = pf.Tokenizer.load(tokenizer)
        texts = read_documents(list(paths), column=column, clean=clean)
        corpus = tokenize(loaded, texts, objective=objective)
    if objective != "mlm" and (whole_word_mask or span_p):
        raise InputError(f"[data] --whole-word-mask and --span-p are for objective mlm, not {objective}")
    batches = pf.Batches(
        corpus,
        objective,
        seq_len=seq_len,
        batch_size=batch_size,
        tokenizer=loaded,
        seed=seed,
        masking=Masking(
            mlm_probability, whole_word=whole_word_mask, span_p=span_p, span_max_length=span_max_length
        ),
    )
    batch = batches.batch(step)
    if as_json:
        click.echo(json.dumps({name: array.tolist() for name, array in batch.items()}))
        return
    console = Console(highlight=False)
    b, t = batch["input_ids"].shape
    counted = int((batch["labels"] != -100).sum())
    console.print(
        f"step {step} of {batches.batches_per_pass:,} in a pass: {b} rows of {t} tokens, {counted} to predict"
    )
    # A grid of its own for the text: its lines begin below each other.
    grid = Table.grid(padding=(0, 1))
    grid.add_column(justify="right", style="dim")
    grid.add_column(overflow="fold")
    room = console.width - len(str(b - 1)) - 1
    for row in range(b):
        grid.add_row(str(row), _row(loaded, batch, row, objective, room))
    console.print(grid)


def _row(tokenizer: pf.Tokenizer, batch: dict[str, Any], row: int, objective: str, room: int) -> Text:
    """A row of a batch in lines of at most ``room`` cells, cut between tokens."""
    ids, labels = batch["input_ids"][row], batch["labels"][row]
    segments = batch.get("segments", np.ones_like(batch["input_ids"]))[row]
    seen = batch["attention_mask"][row] if "attention_mask" in batch else segments > 0
    pieces = []
    for token, label, segment, there in zip(ids, labels, segments, seen, strict=True):
        if not there:
            continue
        text, piece = _token(tokenizer, int(token)), Text()
        style = DOCUMENTS[int(segment - 1) % len(DOCUMENTS)]
        if objective == "mlm" and label != -100:
            piece.append(text, style="bold red underline")
            piece.append(f"[{_token(tokenizer, int(label))}]", style="yellow")
        else:
            piece.append(text, style=f"{style} dim" if tokenizer.is_special(int(token)) else style)
        pieces.append(piece.append("·", style="dim"))
    missing = int((seen == 0).sum())
    if missing:
        pieces.append(Text(f" {missing} × padding", style="dim"))
    lines, used = Text(), 0
    for piece in pieces:
        if used and used + piece.cell_len > room:
            lines.append("\n")
            used = 0
        lines.append_text(piece)
        used += piece.cell_len
    return lines


def _token(tokenizer: pf.Tokenizer, token: int) -> str:
    """A token as it reads in a text; its own name where it is no text alone."""
    text = tokenizer.decode([token], skip_special_tokens=False)
    name = tokenizer.id_to_token(token) or f"<{token}>"
    shown = name if "\ufffd" in text or not text or name.startswith("##") else text
    return shown.replace("\n", "⏎").replace("\t", "⇥")
