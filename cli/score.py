"""``pyrformer score``: how probable texts are, a line each."""

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
@click.option("--stride", type=int, help="Tokens between windows over long texts.  [default: half a window]")
@click.option("--within-word", is_flag=True, help="Masked models: hide the rest of a token's word, too.")
@click.option("--threads", type=click.IntRange(1), help="Threads to use.")
def command(
    run: str, file: str, column: str, stride: int | None, within_word: bool, threads: int | None
) -> None:
    """Score texts with the model in the folder RUN.

    FILE holds a text a line, plain or .jsonl; without it, standard input does. Each line of output is a JSON object:
    log_likelihood in nats, tokens, bytes, bits_per_byte.
    """
    model = pf.load(run, threads=threads)
    for texts in stretches(file, column):
        scores = model.score(texts, stride=stride, within_word=within_word)
        columns = (scores.log_likelihood, scores.tokens, scores.bytes, scores.bits_per_byte)
        for log_likelihood, tokens, size, bits in zip(*(c.tolist() for c in columns), strict=True):
            row = {"log_likelihood": log_likelihood, "tokens": tokens, "bytes": size, "bits_per_byte": bits}
            click.echo(json.dumps(row))
