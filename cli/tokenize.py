"""``pyrformer tokenize``: the ids of texts."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import click

import pyrformer as pf
from pyrformer.pipeline import Verb

from ._files import over_files


@click.command()
@click.argument("tokenizer", type=click.Path())
@click.option("--no-special", is_flag=True, help="Without the special tokens of the template.")
@click.option("--threads", type=click.IntRange(1), help="Threads to use.")
@over_files
def command(
    tokenizer: str, no_special: bool, threads: int | None
) -> tuple[Verb, pf.Tokenizer, dict[str, Any]]:
    """Give texts their ids, with a tokenizer.json or the folder of a model.

    FILES are as for `pyrformer train`, but each line of a .txt file is a text; without FILES, standard input is read.
    Each row comes out with its ids, a list, in "input_ids". What was ended goes on when the same command is given
    again.
    """
    loaded = pf.Tokenizer.load(tokenizer)

    def verb(texts: list[str]) -> list[dict[str, Any]]:
        if not texts:
            return []
        found = loaded.encode_batch(texts, add_special_tokens=not no_special, threads=threads)
        ids, starts = found.ids, found.offsets
        return [{"input_ids": ids[a:b].tolist()} for a, b in pairwise(starts.tolist())]

    return verb, loaded, {"special": not no_special}
