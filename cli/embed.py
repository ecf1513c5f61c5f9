"""``pyrformer embed``: vectors of texts."""

from __future__ import annotations

import json

import click

import pyrformer as pf

from ._files import stretches


@click.command()
@click.argument("run", type=click.Path())
@click.argument("file", type=click.Path(), default="-")
@click.option(
    "--column", default="text", show_default=True, help="Field of .jsonl lines that holds the text."
)
@click.option(
    "--pooling", type=click.Choice(["mean", "cls", "last"]), help="[default: what RUN says, or mean]"
)
@click.option(
    "--normalize/--no-normalize", default=None, help="Scale to length 1.  [default: what RUN says, or yes]"
)
@click.option("--threads", type=click.IntRange(1), help="Threads to use.")
def command(
    run: str, file: str, column: str, pooling: str | None, normalize: bool | None, threads: int | None
) -> None:
    """Print a vector for each text, with the model in the folder RUN.

    FILE holds a text a line, plain or .jsonl; without it, standard input does. Each line of output is a JSON list.
    """
    model = pf.load(run, threads=threads)
    for texts in stretches(file, column):
        for vector in model.embed(texts, pooling=pooling, normalize=normalize):
            click.echo(json.dumps([round(x, 7) for x in vector.tolist()]))
