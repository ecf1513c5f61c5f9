"""``pyrformer runs``: the runs in a folder, a line each."""

from __future__ import annotations

import json
from pathlib import Path

import click

from pyrformer.errors import FileError
from pyrformer.report.runs import Record, Summary, find


@click.command()
@click.argument("folder", default="runs", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print JSON, a line for each run.")
def command(folder: str, as_json: bool) -> None:
    """List the runs in FOLDER and below it.  [default: runs]

    Their family, parameters, updates, state, last training loss, lowest held-out loss, tokens read, and time spent in
    updates. Unreadable runs are named on standard error.
    """
    top = Path(folder)
    lines = []
    for path in find(top):
        name = str(path.relative_to(top)) if path != top else path.name
        try:
            lines.append(Record.read(path).summary(name))
        except FileError as e:
            click.echo(f"pyrformer: note: {e}; left out", err=True)
    if as_json:
        for line in lines:
            click.echo(json.dumps(line.to_dict()))
    elif lines:
        _print(lines)
    else:
        click.echo(f"no runs in {folder}")


def _print(lines: list[Summary]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    names = ("family", "params", "step", "state", "loss", "best", "tokens", "time")
    rows = [
        (
            _printable(line.family or "?")[:10],
            _short(line.parameters),
            f"{line.step}/{'?' if line.steps is None else line.steps}",
            line.state,
            _loss(line.loss),
            _loss(line.best),
            _short(line.tokens),
            _time(line.seconds),
        )
        for line in lines
    ]
    # Names take what the figures leave.
    taken = sum(1 + max(len(name), *(len(row[i]) for row in rows)) for i, name in enumerate(names))
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    room = max(8, console.width - taken - 1)
    table.add_column("run", overflow="ellipsis", no_wrap=True, max_width=room)
    for name in names:
        table.add_column(name, justify="left" if name in ("family", "state") else "right", no_wrap=True)
    styles = {"running": "cyan", "finished": "green", "failed": "red", "stopped": "yellow"}
    for line, row in zip(lines, rows, strict=True):
        cells = [Text(cell, styles[cell] if i == 3 else "") for i, cell in enumerate(row)]
        table.add_row(Text(_printable(line.name)), *cells)
    console.print(table)


def _printable(text: str) -> str:
    """Text that cannot steer a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:#.4g}"


def _short(count: int | None) -> str:
    """A count in at most five characters."""
    if count is None:
        return "?"
    value, unit = float(count), ""
    for larger in "kMGT":
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g}{unit}"


def _time(seconds: float) -> str:
    """A time in at most five characters: 42s, 12m, 3.5h, 2.1d."""
    for size, unit in ((86400, "d"), (3600, "h")):
        if seconds >= size:
            return f"{seconds / size:.3g}{unit}"
    return f"{seconds / 60:.0f}m" if seconds >= 99.5 else f"{seconds:.0f}s"
