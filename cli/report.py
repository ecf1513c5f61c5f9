"""``pyrformer report``: a page about runs."""

from __future__ import annotations

from pathlib import Path

import click

from pyrformer.errors import FileError
from pyrformer.report import report


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=click.Path())
@click.option(
    "--out",
    default="report.html",
    show_default=True,
    type=click.Path(),
    help="The page; - for standard output.",
)
def command(runs: tuple[str, ...], out: str) -> None:
    """Write a page about one run, or about up to eight beside each other.

    Curves of losses, learning rate, gradient norm, size of updates, throughput, waiting and memory; options and how
    they differ; text and machine. The page is one file, needs no network, and opens in any browser.
    """
    page = report(runs)
    if out == "-":
        click.echo(page, nl=False)
        return
    try:
        Path(out).write_text(page, encoding="utf-8")
    except OSError as e:
        raise FileError(f"[report] cannot write {out}: {e.strerror}") from None
    click.echo(f"{out}: {len(page.encode('utf-8')) / 1e3:,.0f} kB; open it in a browser")
