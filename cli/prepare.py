"""``pyrformer prepare``: text in, a folder of tokens out."""

from __future__ import annotations

from pathlib import Path

import click

import pyrformer as pf

from ._progress import files_bar


@click.command()
@click.argument("inputs", nargs=-1, required=True, type=click.Path())
@click.option("--tokenizer", required=True, type=click.Path(), help="A tokenizer.json, or a folder with one.")
@click.option("--out", required=True, type=click.Path(), help="The folder to write, or to go on with.")
@click.option(
    "--objective",
    type=click.Choice(["ar", "mlm"]),
    default="ar",
    show_default=True,
    help="ar: each document ends with the end token; mlm: it does not.",
)
@click.option("--column", default="text", show_default=True, help="Field or column that holds the text.")
@click.option(
    "--errors",
    type=click.Choice(["strict", "replace"]),
    default="strict",
    show_default=True,
    help="What to do with bytes that are not UTF-8.",
)
@click.option(
    "--clean",
    multiple=True,
    help="A cleaning step: nfc, nfkc, control, whitespace, html, duplicates, min-length=N; may be given again.",
)
@click.option(
    "--on-corrupt",
    type=click.Choice(["fail", "skip", "quarantine"]),
    default="fail",
    show_default=True,
    help="What to do with lines and files that cannot be read; quarantine writes them to quarantine.jsonl.",
)
@click.option(
    "--shard-tokens", type=click.IntRange(1), default=1 << 25, help="Tokens in a file.  [default: 2^25]"
)
@click.option("--threads", type=click.IntRange(1), help="Threads to use.")
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="Who tokenizes; ray: the workers of a cluster.",
)
def command(
    inputs: tuple[str, ...],
    tokenizer: str,
    out: str,
    objective: str,
    column: str,
    errors: str,
    clean: tuple[str, ...],
    on_corrupt: str,
    shard_tokens: int,
    threads: int | None,
    engine: str,
) -> None:
    """Tokenize INPUTS into a folder that `pyrformer train` reads in place of text.

    INPUTS are as for `pyrformer train`. Memory does not grow with them. A run that was ended goes on when the same
    command is given again; the folder ends up the same to the byte.
    """
    with files_bar(inputs) as told:
        manifest = pf.prepare(
            list(inputs),
            out,
            pf.Tokenizer.load(tokenizer),
            objective=objective,
            column=column,
            errors=errors,
            clean=clean,
            on_corrupt=on_corrupt,
            shard_tokens=shard_tokens,
            threads=threads,
            engine=engine,
            progress=lambda read, documents, tokens: told(
                read, f"{documents:,} documents, {tokens:,} tokens"
            ),
        )
    for step in manifest["cleaning"]:
        click.echo(
            f"{step['step']}: {step['documents_changed']:,} changed, {step['documents_dropped']:,} dropped, "
            f"{step['characters_removed']:,} characters removed",
            err=True,
        )
    if manifest["rejected"]:
        where = f"; see {Path(out) / 'quarantine.jsonl'}" if on_corrupt == "quarantine" else ""
        click.echo(f"{manifest['rejected']:,} lines or files could not be read{where}", err=True)
    click.echo(
        f"{out}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens in "
        f"{len(manifest['shards'])} shard{'s' if len(manifest['shards']) > 1 else ''}"
    )
