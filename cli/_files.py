"""What commands over files share: lines in, lines or pages out."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import click

from pyrformer.errors import DataError, FileError

#: Texts that go through a model between two stretches of output.
STRETCH = 512


def stretches(path: str, column: str) -> Iterator[list[str]]:
    """The texts of :func:`rows` in lists of at most :data:`STRETCH`."""
    source = rows(path, column)
    while texts := list(islice(source, STRETCH)):
        yield texts


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


def rows(path: str, column: str) -> Iterator[str]:
    """Texts of a file, or of standard input for "-": field ``column`` of ``.jsonl`` lines, else every line that is not
    empty.

    Raises:
        DataError: the file cannot be read, or a line is not what it should be; the message names the place.
    """
    structured = path.endswith(".jsonl")
    try:
        with nullcontext(sys.stdin) if path == "-" else Path(path).open(encoding="utf-8") as source:
            for number, line in enumerate(source, 1):
                if not line.strip():
                    continue
                if path == "-" and number == 1:
                    structured = line.lstrip().startswith("{")
                yield _field(path, number, line, column) if structured else line.rstrip("\n")
    except OSError as e:
        raise DataError(f"[data] cannot read {path}: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise DataError(f"[data] {path} is not UTF-8 at byte {e.start}") from None


def _field(path: str, number: int, line: str, column: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as e:
        raise DataError(f"[data] {path}, line {number} is not JSON: {e}") from None
    if not isinstance(row, dict) or not isinstance(row.get(column), str):
        raise DataError(f"[data] {path}, line {number} has no text {column!r}; name the field with --column")
    text: str = row[column]
    return text
