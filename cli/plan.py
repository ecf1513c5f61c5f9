"""``pyrformer plan``: what a model is compiled into, as a table."""

from __future__ import annotations

import sys

import click

import pyrformer as pf
from pyrformer.models.base import MOST_SIZE
from pyrformer.optimizers import AdamW
from pyrformer.programs import Sizes, decode_step, evaluate, forward, train_step

PROGRAMS = ["train_step", "forward", "evaluate", "decode_step"]


@click.command()
@click.argument("run", type=click.Path())
@click.option("--program", type=click.Choice(PROGRAMS), default="train_step", show_default=True)
@click.option(
    "--batch", type=click.IntRange(1, MOST_SIZE), default=8, show_default=True, help="Rows in a batch."
)
@click.option(
    "--seq", type=click.IntRange(1, MOST_SIZE), help="Tokens in a row.  [default: all positions, at most 256]"
)
@click.option("--graph", is_flag=True, help="Print the graph after the passes instead of the plan.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
def command(run: str, program: str, batch: int, seq: int | None, graph: bool, as_json: bool) -> None:
    """Print the compiled plan of the model in the folder RUN: operations, shapes, bytes, FLOPs, places of results."""
    model = pf.load(run)
    family = model.family
    tokens = seq or min(family.max_positions, 256)
    if tokens > family.max_positions:
        raise click.UsageError(f"--seq {tokens} is more than the model's {family.max_positions} positions")
    labelled = 0 if family.objective == "ar" else max(8, int(0.15 * batch * tokens) // 8 * 8)
    sizes = Sizes(batch, tokens, labelled)
    if program == "decode_step" and family.objective != "ar":
        raise click.UsageError("a masked model has no decode_step")
    traced = {
        "train_step": lambda: train_step(family, sizes, AdamW()),
        "forward": lambda: forward(family, sizes),
        "evaluate": lambda: evaluate(family, sizes),
        "decode_step": lambda: decode_step(family, batch, 1, (batch, tokens), "cache"),
    }[program]()
    lowered = traced.lower()
    if graph:
        click.echo(str(lowered.graph), nl=False)
        return
    if as_json:
        click.echo(lowered.plan.to_json())
        return
    table(lowered.plan.table())
    plan = lowered.plan
    click.echo(
        f"\n{program} of [{batch}, {tokens}]: {len(plan)} steps, {plan.flops / 1e9:.3g} GFLOP, "
        f"{_bytes(plan.traffic_bytes)} moved\n"
        f"arena {_bytes(plan.arena_bytes)} (alive at once {_bytes(plan.live_bytes)}), states {_bytes(plan.state_bytes)}"
    )


def table(rows: list[list[str]]) -> None:
    """Prints steps as columns, as wide as the terminal and no wider than they need."""
    from rich.console import Console
    from rich.table import Table

    out = Table(box=None, pad_edge=False, header_style="bold")
    for name, justify in (
        ("#", "right"),
        ("operation", "left"),
        ("results", "left"),
        ("at", "right"),
        ("bytes", "right"),
        ("FLOP", "right"),
        ("part", "left"),
    ):
        out.add_column(name, justify=justify, no_wrap=True, overflow="ellipsis")  # type: ignore[arg-type]
    for number, operation, _, results, place, size, flops, scope in rows:
        out.add_row(number, operation, results, place, _bytes(int(size)), _count(int(flops)), scope)
    # Piped output is not cut to a terminal's width.
    Console(highlight=False, width=None if sys.stdout.isatty() else 240).print(out)


def _bytes(n: int) -> str:
    for unit in ("B", "kB", "MB"):
        if n < 1000:
            return f"{n:.4g} {unit}"
        n = n / 1000  # type: ignore[assignment]
    return f"{n:.4g} GB"


def _count(n: int) -> str:
    for unit in ("", "k", "M", "G"):
        if n < 1000:
            return f"{n:.4g}{unit}"
        n = n / 1000  # type: ignore[assignment]
    return f"{n:.4g}T"
