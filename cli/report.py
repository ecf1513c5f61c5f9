"""``pyrformer report``: a page about runs."""

from __future__ import annotations

import click

from pyrformer.report import report

from ._files import write_page


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
    write_page(report(runs), out, "report")
