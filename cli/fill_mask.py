"""``pyrformer fill-mask``: what a masked-language model puts in the place of its mask token."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import click

import pyrformer as pf

from ._files import DEVICE, OPTIONS, through


def file_options(command: Any) -> Any:
    """The options of commands over files, but for the files themselves."""
    for option in reversed(OPTIONS[1:]):
        command = option(command)
    return command


@click.command()
@click.argument("run", type=click.Path())
@click.argument("text", required=False)
@click.option(
    "--texts", "files", multiple=True, type=click.Path(), help="A file with texts; may be given again."
)
@click.option("--top-k", type=int, default=5, show_default=True, help="Proposals for each mask.")
@file_options
@DEVICE
@click.option("--threads", type=click.IntRange(1), help="Threads to use.")
@click.option("--json", "as_json", is_flag=True, help="Print a list of proposals for each mask, as JSON.")
def command(
    run: str,
    text: str | None,
    files: tuple[str, ...],
    top_k: int,
    device: str,
    threads: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Propose tokens for each mask token ([MASK]) in TEXT, or in the rows of --texts, with the model in the folder RUN.

    Rows of files come out with "masks", a list of proposals for each mask; the options for --column to --overwrite are
    theirs. What was ended goes on when the same command is given again.
    """
    if (text is None) == (not files):
        raise click.UsageError("give either TEXT or --texts")
    model = pf.load(run, device=device, threads=threads)
    if text is None:

        def verb(texts: list[str]) -> list[dict[str, Any]]:
            return [{"masks": _plain(masks)} for masks in model.fill_mask(texts, top_k)]

        through((verb, model, {"top_k": top_k}), list(files), **options)
        return
    masks = model.fill_mask(text, top_k)
    if as_json:
        click.echo(json.dumps(_plain(masks), ensure_ascii=False))
        return
    for i, proposals in enumerate(masks):
        if len(masks) > 1:
            click.secho(f"mask {i + 1}", dim=True)
        for p in proposals:
            click.echo(f"{p.score:7.4f}  {p.token_str:<16}  {p.sequence}")


def _plain(masks: list[list[Any]]) -> list[list[dict[str, Any]]]:
    return [[dataclasses.asdict(p) for p in proposals] for proposals in masks]
