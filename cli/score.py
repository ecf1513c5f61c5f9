"""``pyrformer score``: how probable texts are."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import click

import pyrformer as pf
from pyrformer.pipeline import Verb

from ._files import BEAT, DEVICE, over_files

#: Fields of a text's score.
FIELDS = ("log_likelihood", "tokens", "bytes", "bits_per_byte")


@click.command()
@click.argument("run", type=click.Path())
@click.option("--stride", type=int, help="Tokens between windows over long texts.  [default: half a window]")
@click.option("--within-word", is_flag=True, help="Masked models: hide the rest of a token's word, too.")
@DEVICE
@click.option("--threads", type=click.IntRange(1), help="Threads to use.")
@over_files
def command(
    run: str, stride: int | None, within_word: bool, device: str, threads: int | None
) -> tuple[Verb, pf.Model, dict[str, Any]]:
    """Score texts with the model in the folder RUN.

    FILES are as for `pyrformer train`, but each line of a .txt file is a text; without FILES, standard input is read.
    Each row comes out with log_likelihood in nats, tokens, bytes and bits_per_byte. What was ended goes on when the
    same command is given again.
    """
    model = pf.load(run, device=device, threads=threads)

    def verb(texts: list[str]) -> list[dict[str, Any]]:
        beat = click.get_current_context().meta[BEAT].beat
        progress = partial(_tell, beat)
        scores = model.score(texts, stride=stride, within_word=within_word, progress=progress)
        columns = (getattr(scores, name).tolist() for name in FIELDS)
        return [dict(zip(FIELDS, row, strict=True)) for row in zip(*columns, strict=True)]

    return verb, model, {"stride": stride, "within_word": within_word}


def _tell(beat: Callable[[str], None], tokens: int) -> None:
    beat(f"{tokens:,} tokens of the next")
