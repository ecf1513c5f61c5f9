"""``pyrformer compare``: two models on one page, in units that they share."""

from __future__ import annotations

import json

import click

import pyrformer as pf
from pyrformer.data.documents import read_documents
from pyrformer.evaluate import evaluate, independence_gap


@click.command()
@click.argument("run_a", type=click.Path())
@click.argument("run_b", type=click.Path())
@click.argument("files", nargs=-1, required=True, type=click.Path())
@click.option(
    "--column", default="text", show_default=True, help="Field of .jsonl lines that holds the text."
)
@click.option("--limit", type=click.IntRange(1), help="Read so many characters of each text at most.")
@click.option(
    "--spans", type=click.IntRange(1), default=100, show_default=True, help="Hidden spans to measure."
)
@click.option("--threads", type=click.IntRange(1), help="Threads to use.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    run_a: str,
    run_b: str,
    files: tuple[str, ...],
    column: str,
    limit: int | None,
    spans: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """Compare the models in RUN_A and RUN_B on FILES (.txt, .jsonl), in bits per byte.

    For masked models also the independence gap: how much less probable the tokens of a hidden span are when each is
    guessed alone than when they are guessed one after the other.
    """
    texts = [text[:limit] for text in read_documents(list(files), column=column)]
    rows = []
    for run in (run_a, run_b):
        model = pf.load(run, threads=threads)
        row = {"run": run, "model_type": model.config["model_type"], **evaluate(model, texts).to_dict()}
        if model.family.objective == "mlm":
            row["gaps"] = [
                {"length": g.length, "independent": g.independent, "chain": g.chain, "gap": g.gap}
                for g in (independence_gap(model, texts, length=n, spans=spans) for n in (2, 3, 4))
            ]
        rows.append(row)
    if as_json:
        click.echo(json.dumps(rows))
        return
    click.echo(f"{'':22}" + "".join(f"{row['run'][-24:]:>26}" for row in rows))
    for name, key, form in (
        ("family", "model_type", "{}"),
        ("objective", "objective", "{}"),
        ("bits per byte", "bits_per_byte", "{:.4f}"),
        ("perplexity a token", "perplexity", "{:.3f}"),
        ("tokens", "tokens", "{}"),
        ("bytes a token", "", "{:.2f}"),
        ("masked accuracy", "masked_accuracy", "{:.1%}"),
    ):
        values = [row["bytes"] / row["tokens"] if not key else row[key] for row in rows]
        cells = ["–" if value is None else form.format(value) for value in values]
        click.echo(f"{name:22}" + "".join(f"{cell:>26}" for cell in cells))
    for row in rows:
        for gap in row.get("gaps", []):
            click.echo(
                f"\n{row['run']}: hidden spans of {gap['length']} tokens, log p of a token: {gap['independent']:.3f} "
                f"guessed alone, {gap['chain']:.3f} one after the other; independence costs {gap['gap']:.3f} nats"
            )
    if {row["objective"] for row in rows} == {"ar", "mlm"}:
        click.echo(
            "\nThe autoregressive figure is the exact code length of the text. The masked one is a pseudo-likelihood: "
            "each\ntoken is guessed from all others, so it is lower than any code could be and not a length of a code."
        )
