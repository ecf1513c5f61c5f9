"""``pyrformer classify``: the classes of texts, or of their tokens."""

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
@click.option("--threads", type=click.IntRange(1), help="Threads to use.")
def command(run: str, file: str, column: str, threads: int | None) -> None:
    """Print the class of each text, with the model in the folder RUN.

    FILE holds a text a line, plain or .jsonl; without it, standard input does. Each line of output is a JSON object:
    "label" and "score", or "tokens", "labels" and "scores" of a model that classifies tokens.
    """
    model = pf.load(run, threads=threads)
    tokenizer = model.require_tokenizer()
    for texts in stretches(file, column):
        found = model.classify(texts)
        for ids, label, scores in zip(found.ids, found.labels, found.scores, strict=True):
            best = scores.max(-1)
            line = (
                {"label": label, "score": round(float(best), 7)}
                if best.ndim == 0
                else {
                    "tokens": [tokenizer.id_to_token(i) for i in ids],
                    "labels": label,
                    "scores": [round(x, 7) for x in best.tolist()],
                }
            )
            click.echo(json.dumps(line, ensure_ascii=False))
