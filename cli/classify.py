"""``pyrformer classify``: the classes of texts, or of their tokens."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

import pyrformer as pf
from pyrformer.pipeline import Verb

from ._files import DEVICE, over_files


@click.command()
@click.argument("run", type=click.Path())
@DEVICE
@click.option("--threads", type=click.IntRange(1), help="Threads to use.")
@over_files
def command(run: str, device: str, threads: int | None) -> tuple[Verb, pf.Model, dict[str, Any]]:
    """Give texts their classes, with the model in the folder RUN.

    FILES are as for `pyrformer train`, but each line of a .txt file is a text; without FILES, standard input is read.
    Each row comes out with "label" and "score"; of a model that classifies tokens with "tokens", "labels" and "scores",
    and "entities": neighbours of one class, as Hugging Face's aggregation "simple" has them, with places in characters.
    What was ended goes on when the same command is given again.
    """
    model = pf.load(run, device=device, threads=threads)
    tokenizer = model.require_tokenizer()

    def verb(texts: list[str]) -> list[dict[str, Any]]:
        found = model.classify(texts)
        results: list[dict[str, Any]] = []
        for n, (ids, label, scores) in enumerate(zip(found.ids, found.labels, found.scores, strict=True)):
            best = scores.max(-1)
            if best.ndim == 0:
                results.append({"label": label, "score": round(float(best), 7)})
            else:
                tokens = [tokenizer.id_to_token(i) for i in ids]
                each = [round(x, 7) for x in best.tolist()]
                spans = [{**asdict(e), "score": round(e.score, 7)} for e in found.entities[n]]
                results.append({"tokens": tokens, "labels": label, "scores": each, "entities": spans})
        return results

    return verb, model, {}
