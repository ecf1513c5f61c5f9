"""``pyrformer fill-mask``: what a masked-language model puts in the place of its mask token."""

from __future__ import annotations

import dataclasses
import json

import click

import pyrformer as pf


@click.command()
@click.argument("run", type=click.Path())
@click.argument("text")
@click.option("--top-k", type=int, default=5, show_default=True, help="Proposals for each mask.")
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where to compute."
)
@click.option("--threads", type=click.IntRange(1), help="Threads to use.")
@click.option("--json", "as_json", is_flag=True, help="Print a list of proposals for each mask, as JSON.")
def command(run: str, text: str, top_k: int, device: str, threads: int | None, as_json: bool) -> None:
    """Propose tokens for each mask token ([MASK]) in TEXT, with the model in the folder RUN."""
    masks = pf.load(run, device=device, threads=threads).fill_mask(text, top_k)
    if as_json:
        click.echo(
            json.dumps(
                [[dataclasses.asdict(p) for p in proposals] for proposals in masks], ensure_ascii=False
            )
        )
        return
    for i, proposals in enumerate(masks):
        if len(masks) > 1:
            click.secho(f"mask {i + 1}", dim=True)
        for p in proposals:
            click.echo(f"{p.score:7.4f}  {p.token_str:<16}  {p.sequence}")
