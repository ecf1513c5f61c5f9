"""``pyrformer explain``: a page that follows one text through a model."""

from __future__ import annotations

import click

import pyrformer as pf

from ._files import write_page


@click.command()
@click.argument("run", type=click.Path())
@click.argument("text")
@click.option(
    "--out",
    default="explain.html",
    show_default=True,
    type=click.Path(),
    help="The page; - for standard output.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(1, 256),
    default=64,
    show_default=True,
    help="Refuse longer texts: the page grows with their square.",
)
@click.option("--threads", type=click.IntRange(1), help="Threads to use.")
def command(run: str, text: str, out: str, max_tokens: int, threads: int | None) -> None:
    """Write a page that follows TEXT through the model in the folder RUN.

    Cleaned text, tokens, special tokens, the padded row, embeddings, queries, keys, values, attention by layer and
    head, the residual stream, the most probable tokens, and the loss of each token. The page is one file, needs no
    network, and opens in any browser.
    """
    write_page(pf.load(run, threads=threads).explain(text, max_tokens=max_tokens), out, "explain")
