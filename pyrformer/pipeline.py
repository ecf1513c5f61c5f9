"""Files through a model: rows in, the same rows with results out.

Rows pass in stretches of :data:`STRETCH`, so memory does not grow with the input. A file to write grows under a hidden
name, ``.NAME.partial``, beside ``.NAME.state.json``, which says after each stretch how far it is whole. A process that
is killed leaves both; the next one of the same command cuts the file to that length, reads over the rows that are done
and goes on, and the file ends up the same to the byte. A stretch is a piece of its own in compressed files (a member of
gzip, a frame of zstd), as both formats allow. Parquet is made of the lines at the end, when all types are known; those
that JSON lacks, such as dates and bytes, stand in the lines under a name of their own until then, and fields that come
from parquet or Arrow keep their types.
"""

from __future__ import annotations

import base64
import datetime
import decimal
import glob
import gzip
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

from pyrformer import _core
from pyrformer.arrow import import_arrow
from pyrformer.checkpoint import read_json, write_json
from pyrformer.data.documents import Documents, Source
from pyrformer.data.prepared import ON_CORRUPT, describe
from pyrformer.errors import DataError, Error, FileError, InputError

#: Rows that go through a model between two stretches of output.
STRETCH = 512
#: Results of texts: a dict of fields for each.
Verb = Callable[[list[str]], list[dict[str, Any]]]
#: What takes the place of rows: for each text some rows, given the texts and the number of the first, from 0.
Maker = Callable[[list[str], int], list[list[dict[str, Any]]]]
#: Told how far the work is: bytes of the files read, rows, rows kept out.
Progress = Callable[[int, int, int], None]

#: Ending of a file to write → what its pieces are packed with.
PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    ".jsonl": bytes,
    ".jsonl.gz": lambda piece: gzip.compress(piece, mtime=0),
    ".jsonl.zst": _core.zstd_frame,
    ".parquet": bytes,
}


@dataclass(frozen=True)
class Made:
    """A verb that gives rows of its own."""

    maker: Maker


@dataclass
class Counts:
    """How far a file is.

    Attributes:
        rows: rows read, without those that cannot be.
        unread: lines, records and files that cannot be read.
        refused: rows whose text the model does not take.
        size, kept: bytes of the output and of the quarantine.
    """

    rows: int = 0
    unread: int = 0
    refused: int = 0
    size: int = 0
    kept: int = 0


def run(
    source: Source,
    verb: Verb | Made,
    out: str | os.PathLike[str] | Callable[[str], object],
    *,
    column: str = "text",
    prefix: str = "",
    on_corrupt: str = "fail",
    identity: dict[str, Any] | None = None,
    overwrite: bool = False,
    stretch: int = STRETCH,
    progress: Progress | None = None,
) -> Counts:
    """Adds the results of texts to the rows they stand in.

    Args:
        source: files, as :class:`pyrformer.Documents` takes them, or an Arrow stream; a line of a ``.txt`` file is
            a row of its own.
        verb: what gives the fields to add; called with an empty list first, where it may complain of its options. Or
            :class:`Made`, what gives rows in the place of those that are read.
        out: the file to write: .jsonl, .jsonl.gz, .jsonl.zst or .parquet, one row a line or record; or what takes
            lines of JSON, end included.
        column: the field with the text.
        prefix: put before the names of the fields that are added.
        on_corrupt: what cannot be read, or is refused with an :class:`InputError`, is an error ("fail"), left out
            ("skip"), or left out and written to OUT.quarantine.jsonl with the reason ("quarantine").
        identity: what else decides the results, such as the model: a file that was begun is gone on with where this,
            the source and the options are the same.
        overwrite: replace ``out``, and forget what was begun.
        stretch: rows that go through the verb, and are written, together.
        progress: told how far the work is, after each stretch.

    Raises:
        DataError: a row cannot be read, or the file was begun with something else.
        FileError: the file exists or cannot be written, or its ending is unknown.
        InputError: an option is unknown, a text is refused, or a field is there already.
    """
    if on_corrupt not in ON_CORRUPT:
        raise InputError(f"[files] on_corrupt must be one of {', '.join(ON_CORRUPT)}, got {on_corrupt!r}")
    if not isinstance(out, (str, os.PathLike)):
        if on_corrupt == "quarantine":
            raise InputError("[files] quarantine needs a file to write: what is kept aside goes beside it")
        work = _Work(source, verb, column, prefix, on_corrupt, stretch, progress)
        for _, lines in work.stretches():
            out(lines.decode())
        return work.counts
    path = Path(out)
    ending = next((e for e in sorted(PACKINGS, key=len, reverse=True) if path.name.lower().endswith(e)), None)
    if ending is None:
        raise FileError(f"[files] cannot tell what {path} should be; name it {', '.join(PACKINGS)}")
    if ending == ".parquet":
        import_arrow(str(path))
    options = {"column": column, "prefix": prefix, "on_corrupt": on_corrupt}
    # As JSON gives it back.
    known = json.loads(json.dumps({"sources": describe(source), "options": options, **(identity or {})}))
    try:
        with _Target(path, PACKINGS[ending], known, overwrite) as target:
            work = _Work(
                source, verb, column, prefix, on_corrupt, stretch, progress, target, ending == ".parquet"
            )
            for number, lines in work.stretches():
                target.write(lines, number)
            target.finish(work.documents.schemas if ending == ".parquet" else None)
            return work.counts
    except OSError as e:
        if isinstance(e, Error):
            raise
        raise FileError(f"[files] {e.filename or path}: {e.strerror or e}") from None


class _Target:
    """A file that grows under a hidden name, and what is kept aside."""

    def __init__(self, path: Path, pack: Callable[[bytes], bytes], identity: dict[str, Any], overwrite: bool):
        self.path, self.pack, self.identity = path, pack, identity
        self.partial = path.with_name(f".{path.name}.partial")
        self.aside = path.with_name(f".{path.name}.quarantine.partial")
        self.state = path.with_name(f".{path.name}.state.json")
        if path.is_dir() or (path.exists() and not overwrite):
            raise FileError(f"[files] {path} exists; name another file, or overwrite it")
        self.counts = Counts() if overwrite else self._begun()
        self._open: list[IO[bytes]] = []

    def _begun(self) -> Counts:
        if not self.state.exists():
            return Counts()
        state = read_json(self.state)
        if state.get("identity") != self.identity:
            raise DataError(
                f"[files] {self.path} was begun with other sources, options or another model; name another file, or "
                "overwrite it"
            )
        counts = Counts(**state["counts"])
        sizes = {p: p.stat().st_size if p.exists() else 0 for p in (self.partial, self.aside)}
        whole = sizes[self.partial] >= counts.size and sizes[self.aside] >= counts.kept
        return counts if whole else Counts()

    def __enter__(self) -> _Target:
        # What a process was writing of the state when it was killed.
        for left in self.path.parent.glob(f".{glob.escape(self.state.name)}.*.partial"):
            left.unlink(missing_ok=True)
        for path, size in ((self.partial, self.counts.size), (self.aside, self.counts.kept)):
            path.touch()
            file = path.open("r+b")
            self._open.append(file)
            file.truncate(size)
            file.seek(size)
        self.out, self.kept = self._open
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._open:
            file.close()

    def keep(self, reason: str, raw: str) -> None:
        """Writes down what is kept out."""
        self.kept.write(f"{_json({'reason': reason, 'text': raw})}\n".encode())

    def write(self, lines: bytes, counts: Counts) -> None:
        """A stretch, and how far the file is with it."""
        self.out.write(self.pack(lines))
        for file in self._open:
            file.flush()
            os.fsync(file.fileno())
        counts.size, counts.kept = self.out.tell(), self.kept.tell()
        write_json(self.state, {"identity": self.identity, "counts": asdict(counts)})

    def finish(self, schemas: list[Any] | None) -> None:
        """Gives the files their names; with the types of the sources, those of them that have some, as parquet."""
        if not self.out.tell():
            # Compressed, nothing is something.
            self.out.write(self.pack(b""))
        self.__exit__()
        made = self.partial
        if schemas is not None:
            made = self.path.with_name(f".{self.path.name}.made")
            _to_parquet(self.partial, made, schemas)
        if self.aside.stat().st_size:
            self.aside.replace(self.path.with_name(f"{self.path.name}.quarantine.jsonl"))
        made.replace(self.path)
        for left in (self.partial, self.aside, self.state):
            left.unlink(missing_ok=True)


class _Work:
    """Rows in, lines with results out."""

    def __init__(
        self,
        source: Source,
        verb: Verb | Made,
        column: str,
        prefix: str,
        on_corrupt: str,
        size: int,
        progress: Progress | None,
        target: _Target | None = None,
        typed: bool = False,
    ):
        self.verb, self.column, self.prefix, self.progress = verb, column, prefix, progress
        self.size = size
        self.lenient, self.typed = on_corrupt != "fail", typed
        self.keep = target.keep if target is not None and on_corrupt == "quarantine" else None
        self.counts = target.counts if target is not None else Counts()
        #: Rows and rejections met in this process, those of an earlier one read over.
        self.read = self.met = 0
        self.documents = Documents(source, column=column, on_corrupt=self._unread if self.lenient else None)

    def _unread(self, reason: str, raw: str) -> None:
        self.met += 1
        if self.met > self.counts.unread:
            self.counts.unread += 1
            if self.keep is not None:
                self.keep(reason, raw)

    def stretches(self) -> Iterator[tuple[Counts, bytes]]:
        """The lines of each stretch, and the counts with it."""
        self._through([], 0)
        source = self.documents.rows()
        done = self.counts.rows
        while stretch := list(islice(source, self.size)):
            first, self.read = self.read, self.read + len(stretch)
            if self.read > done:
                rows = self._results(stretch, first)
                lines = "".join(f"{_json(row, typed=self.typed)}\n" for row in rows).encode()
                self.counts.rows = self.read
                yield self.counts, lines
            if self.progress is not None:
                counts = self.counts
                self.progress(self.documents.bytes_read, self.read, counts.unread + counts.refused)
        if self.read < done:
            raise DataError("[files] the source is shorter than when the file was begun; overwrite it")

    def _results(self, rows: list[dict[str, Any]], first: int) -> Iterator[dict[str, Any]]:
        try:
            results = self._through(rows, first)
        except InputError:
            # One by one, to find the text that is refused.
            for number, row in enumerate(rows, first + 1):
                try:
                    alone = self._through([row], number - 1)
                except InputError as e:
                    if not self.lenient:
                        raise InputError(f"{e}; this is row {number} of the input") from None
                    self.counts.refused += 1
                    if self.keep is not None:
                        self.keep(f"row {number}: {e}", _json(row))
                    continue
                yield from self._made(row, alone[0])
            return
        for row, result in zip(rows, results, strict=True):
            yield from self._made(row, result)

    def _through(self, rows: list[dict[str, Any]], first: int) -> list[Any]:
        """What the verb gives for each row."""
        texts = [row[self.column] for row in rows]
        return self.verb.maker(texts, first) if isinstance(self.verb, Made) else self.verb(texts)

    def _made(self, row: dict[str, Any], result: Any) -> list[dict[str, Any]]:
        return result if isinstance(self.verb, Made) else [self._joined(row, result)]

    def _joined(self, row: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
        added = {self.prefix + name: value for name, value in result.items()}
        taken = next((name for name in added if name in row), None)
        if taken is not None:
            raise DataError(f"[files] the rows have a field {taken!r} already; set a prefix for those added")
        return {**row, **(_finite(added) if self.typed else added)}


def _json(row: dict[str, Any], *, typed: bool = False) -> str:
    """A row as a line; where ``typed``, :func:`_unnamed` gives back the values that JSON lacks."""
    if typed:
        return json.dumps(row, ensure_ascii=False, default=_named)
    try:
        return json.dumps(row, ensure_ascii=False, default=str, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(row), ensure_ascii=False, default=str)


#: The field that names the type of a value that JSON lacks.
TYPE = "$pyrformer"


def _named(value: Any) -> Any:
    """A value that JSON lacks, under the name of its type."""
    for name, (kind, said, _) in TYPES.items():
        if isinstance(value, kind):
            return {TYPE: name, "value": said(value)}
    return str(value)


def _unnamed(value: dict[str, Any]) -> Any:
    name = value.get(TYPE)
    return TYPES[name][2](value["value"]) if isinstance(name, str) and name in TYPES else value


def _seconds(value: datetime.timedelta) -> int:
    return value // datetime.timedelta(microseconds=1)


#: Types that Arrow has and JSON lacks: Python's, how they are written, how they are read. The first one that fits.
TYPES: dict[str, tuple[type, Callable[[Any], Any], Callable[[Any], Any]]] = {
    "bytes": (bytes, lambda v: base64.b64encode(v).decode(), base64.b64decode),
    "datetime": (datetime.datetime, lambda v: v.isoformat(), datetime.datetime.fromisoformat),
    "date": (datetime.date, lambda v: v.isoformat(), datetime.date.fromisoformat),
    "time": (datetime.time, lambda v: v.isoformat(), datetime.time.fromisoformat),
    "timedelta": (datetime.timedelta, _seconds, lambda v: datetime.timedelta(microseconds=v)),
    "decimal": (decimal.Decimal, str, decimal.Decimal),
}


def _finite(value: Any) -> Any:
    """What JSON can say: numbers that are not finite become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(v) for name, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, (list, tuple)) else value


def _to_parquet(lines: Path, path: Path, sources: list[Any]) -> None:
    """Lines of JSON as records, with the types that fit all of them; fields of the sources keep theirs.

    Args:
        sources: the types of the sources that have some.

    Raises:
        DataError: no type fits a field.
    """
    arrow = import_arrow(str(path))

    def write(schema: Any) -> None:
        with arrow.parquet.ParquetWriter(path, schema) as writer:
            for table in _tables(arrow, lines, schema):
                writer.write_table(table)

    try:
        schemas = [table.schema for table in _tables(arrow, lines)]
        found = arrow.unify_schemas(schemas or [arrow.schema([])], promote_options="permissive")
        try:
            known = {field.name: field for field in arrow.unify_schemas(sources)} if sources else {}
            write(arrow.schema([known.get(field.name, field) for field in found]))
        except arrow.ArrowException:
            # Sources of different types, or some without any.
            write(found)
    except arrow.ArrowException as e:
        raise DataError(f"[files] the fields of the rows have no common types ({e}); write .jsonl") from None


def _tables(arrow: Any, lines: Path, schema: Any = None) -> Iterator[Any]:
    with lines.open(encoding="utf-8") as file:
        while rows := [json.loads(line, object_hook=_unnamed) for line in islice(file, STRETCH)]:
            if schema is None:
                names = list(dict.fromkeys(name for row in rows for name in row))
                yield arrow.table({name: [row.get(name) for row in rows] for name in names})
            else:
                yield arrow.Table.from_pylist(rows, schema=schema)
