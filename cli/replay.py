"""``pyrformer replay``: an update that was not finite, once more."""

from __future__ import annotations

import dataclasses
import json

import click

from pyrformer.training.failure import Finding, replay


@click.command()
@click.argument("folder", metavar="RUN|FOLDER", type=click.Path())
@click.option("--threads", type=click.IntRange(1), help="Threads to use; their number changes no value.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def command(folder: str, threads: int | None, as_json: bool) -> None:
    """Make an update whose loss or gradient was not finite again.

    Runs it from the parameters and the batches that the run kept in failed-step-N, looks at the values of every
    operation, and says the first one whose result is not finite, with the ranges of what it reads. Exit code 1 where
    all values are finite this time.
    """
    found, facts = replay(folder, threads or 0)
    if as_json:
        click.echo(json.dumps({**facts, "finding": found and dataclasses.asdict(found)}))
    else:
        _tell(found, facts)
    if found is None:
        raise SystemExit(1)


def _tell(found: Finding | None, facts: dict[str, object]) -> None:
    click.echo(
        f"update {facts['step']}: loss {facts.get('loss')}, gradient norm {facts.get('grad_norm')}, "
        f"learning rate {facts['learning_rate']}"
    )
    if found is None:
        click.echo(
            "all values are finite this time; the run computed on another device or with another version"
        )
        return
    click.echo(str(found))
    part = "" if found.batch is None else f", batch {found.batch} of the update"
    click.echo(f"step {found.step} of {found.program}{part}")
    lines = [("reads", v) for v in found.inputs] + [("makes", v) for v in found.outputs]
    widths = [max(len(getattr(v, column)) for _, v in lines) for column in ("name", "type")]
    for what, value in lines:
        click.echo(f"  {what}  {value.name:{widths[0]}}  {value.type:{widths[1]}}  {value.range}")
    rows = facts.get("rows")
    for row in rows if isinstance(rows, list) else ():
        if found.batch in (None, row["batch"]):
            documents = ", ".join(map(str, row["documents"]))
            click.echo(f"row {row['row']}, document {documents}: {row['text']!r}")
