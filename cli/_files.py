"""What commands over files share: rows in, rows with results out; pages."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

import pyrformer as pf
from pyrformer.data.prepared import ON_CORRUPT
from pyrformer.errors import FileError
from pyrformer.pipeline import Made, Verb, run

from ._progress import Told, files_bar

# fmt: off
#: The options of commands over files, and what they are told by.
OPTIONS = (
    click.argument("files", nargs=-1, type=click.Path()),
    click.option("--column", default="text", show_default=True, help="Field or column that holds the text."),
    click.option(
        "--out", type=click.Path(), default="-",
        help="A .jsonl, .jsonl.gz, .jsonl.zst or .parquet file.  [default: lines to standard output]",
    ),
    click.option("--prefix", default="", help="Put before the names of the fields that are added."),
    click.option(
        "--on-corrupt", type=click.Choice(ON_CORRUPT), default="fail", show_default=True,
        help="What to do with rows that cannot be read; quarantine writes them to OUT.quarantine.jsonl.",
    ),
    click.option("--overwrite", is_flag=True, help="Replace OUT, and forget what was begun."),
)
#: Where commands over files compute.
DEVICE = click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where to compute."
)
# fmt: on


def over_files(
    command: Callable[..., tuple[Verb, pf.Model | pf.Tokenizer, dict[str, Any]]],
) -> Callable[..., None]:
    """Makes a command over files of a function that takes the other options and gives what is done to texts, by what,
    and the options that decide the results."""

    @wraps(command)
    def whole(
        files: tuple[str, ...],
        column: str,
        out: str,
        prefix: str,
        on_corrupt: str,
        overwrite: bool,
        **options: Any,
    ) -> None:
        through(command(**options), list(files) or ["-"], column, out, prefix, on_corrupt, overwrite)

    for option in reversed(OPTIONS):
        whole = option(whole)
    return whole


def through(
    done: tuple[Verb | Made, pf.Model | pf.Tokenizer, dict[str, Any]],
    source: list[str],
    column: str,
    out: str,
    prefix: str,
    on_corrupt: str,
    overwrite: bool,
    **more: Any,
) -> None:
    """Puts files through what is done to texts, by what, with the options that decide the results; ``more`` goes to
    :func:`pyrformer.pipeline.run`."""
    verb, handle, deciding = done
    with files_bar(source, hidden=out == "-" and sys.stdout.isatty()) as told:
        context = click.get_current_context()
        telling = context.meta[BEAT] = _Telling(told)
        counts = run(
            source,
            verb,
            _echo if out == "-" else out,
            column=column,
            prefix=prefix,
            on_corrupt=on_corrupt,
            identity={"command": context.info_name, "by": _by(handle), "given": deciding},
            overwrite=overwrite,
            progress=telling,
            **more,
        )
    rejected = counts.unread + counts.refused
    if rejected:
        where = f"; see {out}.quarantine.jsonl" if on_corrupt == "quarantine" else ""
        click.echo(f"{rejected:,} rows or files were left out{where}", err=True)
    if out != "-":
        click.echo(f"{out}: {counts.rows - counts.refused:,} rows", err=True)


def _echo(lines: str) -> None:
    click.echo(lines, nl=False)


def _by(handle: pf.Model | pf.Tokenizer) -> Any:
    """What tells one model or tokenizer from another."""
    if isinstance(handle, pf.Tokenizer):
        return hashlib.sha256(handle.to_json().encode()).hexdigest()
    return [str(handle.origin.path), handle.origin.marks] if handle.origin else None


#: Where a command finds what tells how far it is.
BEAT = "pyrformer.beat"


class _Telling:
    """Rows that are done, and what is done of those under way."""

    def __init__(self, told: Told):
        self.told, self.read, self.rows = told, 0, "0 rows"

    def __call__(self, read: int, rows: int, rejected: int) -> None:
        self.read, self.rows = read, f"{rows:,} rows" + (f", {rejected:,} left out" if rejected else "")
        self.told(read, self.rows)

    def beat(self, what: str) -> None:
        """Tells of the rows under way."""
        self.told(self.read, f"{self.rows}, {what}")


def write_page(page: str, out: str, command: str) -> None:
    """Writes an HTML page to a file, or to standard output for "-".

    Raises:
        FileError: the file cannot be written.
    """
    if out == "-":
        click.echo(page, nl=False)
        return
    try:
        Path(out).write_text(page, encoding="utf-8")
    except OSError as e:
        raise FileError(f"[{command}] cannot write {out}: {e.strerror}") from None
    click.echo(f"{out}: {len(page.encode('utf-8')) / 1e3:,.0f} kB; open it in a browser")
