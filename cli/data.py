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
from pyrformer.data.prepared import is_prepared
from pyrformer.errors import InputError

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
            tokens += len(loaded.without_truncation().encode_batch(cleaned, add_special_tokens=False).ids)
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
@click.option(
    "--objective",
    type=click.Choice(["ar", "prefix", "mlm", "mlm+nsp", "plm"]),
    help="What is learned.  [default: ar, or mlm where the text was prepared for it]",
)
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
    objective: str | None,
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

    PATHS are text files (with --tokenizer), or one folder that `pyrformer prepare` wrote. Each document of a row has a
    colour; of a pair, each text. Tokens to predict are underlined where not all are: with what is hidden behind them in
    brackets or, for plm, their turn. A prefix is bold and
    ends with a bar.
    """
    from pyrformer.data.batches import Masking
    from pyrformer.data.documents import read_documents, tokenize
    from pyrformer.data.pairs import sentences

    corpus: Any
    if any(map(is_prepared, paths)):
        found = pf.Prepared.open(paths[0])
        loaded, corpus = found.tokenizer, found.corpus
        made = str(found.manifest["options"].get("objective", "ar"))
        objective = objective or made
        if len(paths) > 1:
            raise InputError("[data] a prepared folder is looked at alone; name one")
        if objective == "mlm+nsp":
            raise InputError(
                f"[data] {paths[0]} holds no sentences for mlm+nsp; name text files and --tokenizer"
            )
        if (objective == "mlm") != (made == "mlm"):
            wanted = "mlm" if objective == "mlm" else "ar"
            raise InputError(
                f"[data] {paths[0]} was prepared for {made}, not {objective}; prepare the text with "
                f"--objective {wanted}, or name the text files"
            )
    elif tokenizer is None:
        raise click.UsageError("text files need --tokenizer")
    else:
        objective = objective or "ar"
        loaded = pf.Tokenizer.load(tokenizer)
        texts = read_documents(list(paths), column=column, clean=clean)
        corpus = (
            sentences(loaded, texts)
            if objective == "mlm+nsp"
            else tokenize(loaded, texts, objective=objective)
        )
    if not objective.startswith("mlm") and (whole_word_mask or span_p):
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
        arrays = {name: array[row] for name, array in batch.items() if len(array) == b and array.ndim > 1}
        grid.add_row(str(row), _row(loaded, arrays, int(batch.get("prefix", np.zeros(b))[row]), room))
        follows = batch.get("next_sentence_label", np.full(b, -100))[row]
        if follows >= 0:
            said = "the second text follows the first" if follows == 0 else "the second text is another one"
            grid.add_row("", Text(said, style="dim"))
    console.print(grid)


def _row(tokenizer: pf.Tokenizer, row: dict[str, Any], prefix: int, room: int) -> Text:
    """A row of a batch in lines of at most ``room`` cells, cut between tokens."""
    ids = row["input_ids"]
    seen = row.get("attention_mask", row.get("segments", np.ones_like(ids))) > 0
    colours = row.get("segments", row.get("token_type_ids", np.zeros_like(ids)) + 1)
    behind = _behind(tokenizer, row)
    pieces = []
    for place in np.flatnonzero(seen).tolist():
        token = int(ids[place])
        style = DOCUMENTS[int(colours[place] - 1) % len(DOCUMENTS)]
        if place in behind:
            style = "bold red underline"
        elif place < prefix:
            style += " bold"
        elif tokenizer.is_special(token):
            style += " dim"
        piece = Text(_token(tokenizer, token), style=style)
        if place in behind:
            piece.append(f"[{behind[place]}]", style="yellow not bold not underline")
        end = "│" if place + 1 == prefix else "·"
        pieces.append(piece.append(end, style="dim not bold not underline"))
    missing = int((~seen).sum())
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


def _behind(tokenizer: pf.Tokenizer, row: dict[str, Any]) -> dict[int, str]:
    """By place, what stands in brackets behind a token: what it was before it was masked, or its turn in the order."""
    if "target_mapping" in row:
        places = row["target_mapping"].argmax(-1)[row["labels"] != -100]
        # The more of the targets a token does not see, the earlier its turn.
        turns = (row["perm_mask"][np.ix_(places, places)] == 0).sum(-1) + 1
        return {int(place): str(turn) for place, turn in zip(places, turns, strict=True)}
    if "attention_mask" not in row:
        return {}
    labels = row["labels"]
    return {int(place): _token(tokenizer, int(labels[place])) for place in np.flatnonzero(labels != -100)}


def _token(tokenizer: pf.Tokenizer, token: int) -> str:
    """A token as it reads in a text; its own name where it is no text alone."""
    text = tokenizer.decode([token], skip_special_tokens=False)
    name = tokenizer.id_to_token(token) or f"<{token}>"
    shown = name if "\ufffd" in text or not text or name.startswith("##") else text
    return shown.replace("\n", "⏎").replace("\t", "⇥")
