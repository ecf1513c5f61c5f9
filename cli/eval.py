"""``pyrformer eval``: what a model knows of a text."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

import pyrformer as pf
from pyrformer.data.documents import read_documents
from pyrformer.evaluate import evaluate


@click.command()
@click.argument("run", type=click.Path())
@click.argument("files", nargs=-1, required=True, type=click.Path())
@click.option(
    "--column", default="text", show_default=True, help="Field of .jsonl lines that holds the text."
)
@click.option("--limit", type=click.IntRange(1), help="Read so many characters of each text at most.")
@click.option("--stride", type=int, help="Tokens between windows over long texts.  [default: half a window]")
@click.option("--within-word", is_flag=True, help="Masked models: hide the rest of a token's word, too.")
@click.option(
    "--order",
    "orders",
    multiple=True,
    type=click.IntRange(0),
    metavar="SEED",
    help="Permutation models: measure in an order drawn with this seed; may be given again, for the mean.",
)
@click.option("--load-in-8bit", is_flag=True, help="Keep weights in 8 bits: a quarter of the memory, faster.")
@click.option("--threads", type=click.IntRange(1), help="Threads to use.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    run: str,
    files: tuple[str, ...],
    column: str,
    limit: int | None,
    stride: int | None,
    within_word: bool,
    orders: tuple[int, ...],
    load_in_8bit: bool,
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure the model in the folder RUN on FILES (.txt, .jsonl).

    Autoregressive models, and permutation models from left to right: exact log-likelihood, perplexity, bits per byte.
    Masked models: pseudo-log-likelihood (one pass a token: slow; see --limit), pseudo-perplexity, and the share of
    hidden tokens that are guessed. Models that classify tokens: accuracy on words, and precision, recall and F1 of
    whole entities; FILES hold words with classes, as for `pyrformer train --objective tokens`.
    """
    model = pf.load(run, threads=threads, load_in_8bit=load_in_8bit)
    if model.family.objective == "tokens":
        from pyrformer.data.tagging import measure

        tags = measure(model, list(files))
        if as_json:
            click.echo(json.dumps(asdict(tags)))
            return
        click.echo(f"{'words':24}{tags.words}")
        click.echo(f"{'accuracy':24}{tags.accuracy:.4f}")
        click.echo(f"{'entities':24}{tags.entities}")
        for name in ("precision", "recall", "f1"):
            click.echo(f"{'entity ' + name:24}{getattr(tags, name):.4f}")
        return
    texts = [text[:limit] for text in read_documents(list(files), column=column)]
    found = evaluate(model, texts, stride=stride, within_word=within_word, orders=orders)
    if as_json:
        click.echo(json.dumps(found.to_dict()))
        return
    pseudo = "pseudo-" if found.objective == "mlm" else ""
    lines = [
        (f"{pseudo}log-likelihood", f"{found.log_likelihood:.2f} nats"),
        ("tokens", f"{found.tokens}"),
        ("bytes", f"{found.bytes}"),
        (f"{pseudo}perplexity", f"{found.perplexity:.3f} a token"),
        ("bits per byte", f"{found.bits_per_byte:.4f}"),
    ]
    if found.masked_accuracy is not None:
        lines.append(("masked accuracy", f"{found.masked_accuracy:.1%} of hidden tokens guessed"))
    if found.orders:
        each = found.orders.values()
        lines.append(("bits per byte by order", " ".join(f"{bits:.4f}" for bits in each)))
    for name, value in lines:
        click.echo(f"{name:24}{value}")
