"""``pyrformer embed``: vectors of texts."""

from __future__ import annotations

from typing import Any

import click

import pyrformer as pf
from pyrformer.pipeline import Verb

from ._files import DEVICE, over_files


@click.command()
@click.argument("run", type=click.Path())
@click.option(
    "--pooling", type=click.Choice(["mean", "cls", "last"]), help="[default: what RUN says, or mean]"
)
@click.option(
    "--normalize/--no-normalize", default=None, help="Scale to length 1.  [default: what RUN says, or yes]"
)
@DEVICE
@click.option("--threads", type=click.IntRange(1), help="Threads to use.")
@over_files
def command(
    run: str, pooling: str | None, normalize: bool | None, device: str, threads: int | None
) -> tuple[Verb, pf.Model, dict[str, Any]]:
    """Give texts their vectors, with the model in the folder RUN.

    FILES are as for `pyrformer train`, but each line of a .txt file is a text; without FILES, standard input is read.
    Each row comes out with its vector, a list, in "embedding". What was ended goes on when the same command is given
    again.
    """
    model = pf.load(run, device=device, threads=threads)

    def verb(texts: list[str]) -> list[dict[str, Any]]:
        vectors = model.embed(texts, pooling=pooling, normalize=normalize)
        return [{"embedding": [round(x, 7) for x in vector.tolist()]} for vector in vectors]

    return verb, model, {"pooling": pooling, "normalize": normalize}
