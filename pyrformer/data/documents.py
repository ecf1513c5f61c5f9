"""From files to ids: reading, cleaning, tokenizing. What is made of ids: :mod:`pyrformer.data.batches`."""

from __future__ import annotations

import glob
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from pyrformer import _core
from pyrformer.arrow import import_arrow
from pyrformer.errors import DataError, InputError
from pyrformer.tokenizers import Ragged, Tokenizer

#: What text is tokenized for: rows in which one document follows another, or rows of their own.
OBJECTIVES = ("ar", "mlm")

#: Extensions of files that a folder is searched for; each also with ``.gz`` or ``.zst``, except parquet.
EXTENSIONS = (".txt", ".jsonl", ".csv", ".tsv")
#: Bytes of text that pass from the reader to the cleaning steps at once.
CHUNK = 1 << 20
#: Bytes of rows that are read at once.
ROWS_CHUNK = 1 << 16

#: Names of files and folders, or texts themselves; see :class:`Documents`.
Source: TypeAlias = "str | PathLike[str] | Sequence[str | PathLike[str]] | Iterable[str] | Any"


@dataclass(frozen=True)
class Cleaned:
    """What a cleaning step did.

    Attributes:
        step: its name.
        documents_changed, documents_dropped: how many documents it changed and left out.
        characters_removed: characters before it less characters after it; negative where it lengthened the texts.
    """

    step: str
    documents_changed: int
    documents_dropped: int
    characters_removed: int


class Documents:
    """The documents of a source, one at a time and cleaned: memory does not grow with the source.

    A source is one of

    - a path, or a list or tuple of paths. A ``.txt`` file is one document, or several where it is longer than 4 MiB:
      each ends with the first line after so many bytes. ``.jsonl`` has one a line, in the field ``column``; ``.csv``,
      ``.tsv`` (with a header) and ``.parquet`` one a record, in that column. All but parquet may end in ``.gz`` or
      ``.zst``. A folder stands for the files below it that have one of these extensions, a pattern (``*``, ``?``,
      ``[…]``, ``**``) for the files that match it, both in the order of their names. ``-`` is standard input: JSON
      lines if it begins with ``{``, a text otherwise.
    - an object with ``__arrow_c_stream__`` (of pyarrow, polars, duckdb): the strings of its ``column``.
    - any other iterable of strings: the documents themselves.

    Parquet and Arrow need ``pip install pyrformer[arrow]``.
    """

    def __init__(
        self,
        source: Source,
        *,
        column: str = "text",
        errors: str = "strict",
        clean: Sequence[str] = (),
        on_corrupt: Callable[[str, str], None] | None = None,
    ):
        """
        Args:
            column: where the text is, in sources that have columns.
            errors: "strict": bytes that are no UTF-8 are an error that names their place; "replace": they become
                U+FFFD.
            clean: cleaning steps, applied in this order: "nfc", "nfkc" (Unicode normalisation), "control" (removes
                control characters), "whitespace" (joins runs of it), "html" (decodes character references),
                "duplicates" (drops documents that came before), "min-length=N" (drops those of fewer characters).
            on_corrupt: called with the reason and the line or record (empty for a file) of what cannot be read; reading
                goes on behind it. Default: that is an error.

        Raises:
            DataError: a step is unknown.
            InputError: errors is neither of the two.
        """
        if errors not in ("strict", "replace"):
            raise InputError(f"[data] errors must be 'strict' or 'replace', got {errors!r}")
        self._source, self._column, self._replace = source, column, errors == "replace"
        self._on_corrupt = on_corrupt
        self._cleaner = _core.Cleaner(list(clean))
        self._bytes_before = 0
        #: The types of each Arrow source read so far.
        self.schemas: list[Any] = []
        self._reader: _core.Documents | None = None

    @property
    def report(self) -> list[Cleaned]:
        """What each cleaning step did so far."""
        return [Cleaned(*row) for row in self._cleaner.report()]

    @property
    def bytes_read(self) -> int:
        """Bytes read from files so far, as they are on the disk."""
        return self._bytes_before + (self._reader.bytes_read if self._reader else 0)

    def __iter__(self) -> Iterator[str]:
        """
        Raises:
            DataError: a file is missing, empty, damaged, not UTF-8 or not what its extension says, or has no such
                column; the message names the place. Documents before that place have been given by then.
        """
        for chunk in self.chunks():
            yield from self.clean(chunk)

    def clean(self, documents: list[str]) -> list[str]:
        """The documents after all cleaning steps, without those that a step drops."""
        return self._cleaner.clean(documents)

    def chunks(self) -> Iterator[list[str]]:
        """The documents before cleaning, in lists of about a megabyte that depend on the source alone.

        Raises:
            DataError: as for iterating over the documents.
        """
        source: Any = self._source
        if isinstance(source, (str, PathLike, list, tuple)) or hasattr(source, "__arrow_c_stream__"):
            yield from self._chunks()
            return
        texts = iter(source)
        while chunk := list(itertools.islice(texts, 256)):
            for text in chunk:
                if not isinstance(text, str):
                    raise InputError(f"[data] documents must be strings, got a {type(text).__name__}")
            yield chunk

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows of files or of an Arrow stream, not cleaned: dicts with all fields in their order, the text among
        them. A row of a ``.txt`` file is a line that is not blank; it has the text alone.

        Raises:
            DataError: as for iterating over the documents.
        """
        for chunk in self._chunks(rows=True):
            for row in chunk:
                yield json.loads(row) if isinstance(row, str) else row

    def _chunks(self, *, rows: bool = False) -> Iterator[list[Any]]:
        """Texts, or rows as dicts or JSON."""
        source: Any = self._source
        if isinstance(source, (str, PathLike)):
            source = [source]
        if isinstance(source, (list, tuple)):
            files = expand(source)
            for is_parquet, group in itertools.groupby(files, lambda f: f.suffix.lower() == ".parquet"):
                for file in group if is_parquet else ():
                    yield from self._parquet(file, rows)
                    self._bytes_before += file.stat().st_size
                if not is_parquet:
                    yield from self._read(list(group), rows)
        else:
            stream = import_arrow("an Arrow stream").RecordBatchReader.from_stream(source)
            self.schemas.append(stream.schema)
            yield from self._batches(stream, "the Arrow stream", rows)

    def _read(self, files: list[Path], rows: bool) -> Iterator[list[str]]:
        lenient = self._on_corrupt is not None
        self._reader = reader = _core.Documents(files, self._column, self._replace, lenient, rows)
        while (chunk := reader.read(ROWS_CHUNK if rows else CHUNK)) is not None:
            for reason, raw in reader.rejected():
                self._reject(DataError(reason), raw)
            yield chunk
        self._bytes_before, self._reader = self.bytes_read, None

    def _reject(self, error: DataError, raw: str = "") -> None:
        if self._on_corrupt is None:
            raise error
        self._on_corrupt(str(error), raw)

    def _parquet(self, file: Path, rows: bool) -> Iterator[list[Any]]:
        arrow = import_arrow(str(file))
        try:
            with arrow.parquet.ParquetFile(file) as table:
                if self._has_column(table.schema_arrow, str(file)):
                    self.schemas.append(table.schema_arrow)
                    columns = None if rows else [self._column]
                    yield from self._batches(table.iter_batches(1024, columns=columns), str(file), rows)
        except FileNotFoundError as e:
            raise DataError(f"[data] {file} does not exist; check the path") from e
        except (OSError, UnicodeDecodeError, arrow.ArrowException) as e:
            reason = str(e).splitlines()[0] if str(e) else type(e).__name__
            self._reject(DataError(f"[data] {file} is not a whole parquet file ({reason}); write it again"))

    def _has_column(self, schema: Any, where: str) -> bool:
        if schema.names.count(self._column) == 1:
            return True
        names = ", ".join(n.replace("\n", "\\n").replace("\r", "\\r") for n in schema.names) or "(none)"
        self._reject(
            DataError(f"[data] {where} has no column {self._column!r}; set column to one of {names}")
        )
        return False

    def _batches(self, batches: Any, where: str, rows: bool) -> Iterator[list[Any]]:
        row = 0
        for batch in batches:
            if not self._has_column(batch.schema, where):
                return
            found: list[Any] = []
            values = _values(batch.column(batch.schema.get_field_index(self._column)))
            whole = _rows(batch, values) if rows else ()
            for value, kept in itertools.zip_longest(values, whole):
                if isinstance(value, str):
                    found.append(kept if rows else value)
                else:
                    what = "no value" if value is None else f"a value of type {type(value).__name__}"
                    if isinstance(value, UnicodeDecodeError):
                        what = "bytes that are no UTF-8"
                    self._reject(
                        DataError(
                            f"[data] row {row} of {where} has {what} in column {self._column!r}, not text"
                        ),
                        repr(value),
                    )
                row += 1
            yield found


def _values(column: Any) -> list[Any]:
    """The values of a column of Arrow, in place of text that is no UTF-8 its error."""
    try:
        values: list[Any] = column.to_pylist()
        return values
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in column]


def _rows(batch: Any, values: list[Any]) -> list[Any]:
    """The rows of a batch of Arrow; where one holds text that is no UTF-8, its value becomes the error."""
    try:
        rows: list[Any] = batch.to_pylist()
        return rows
    except UnicodeDecodeError:
        rows = []
    for i in range(len(batch)):
        try:
            rows += batch.slice(i, 1).to_pylist()
        except UnicodeDecodeError as e:
            values[i] = e
            rows.append(None)
    return rows


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as e:
        return e


def expand(paths: Sequence[str | PathLike[str]]) -> list[Path]:
    """The files that paths, folders and patterns stand for; those of one folder or pattern in the order of their names.

    Raises:
        DataError: a folder or pattern stands for no file, or a text stands where a path should.
    """
    endings = (*(e + z for e in EXTENSIONS for z in ("", ".gz", ".zst")), ".parquet")
    files: list[Path] = []
    for path in map(Path, paths):
        try:
            is_folder = path.is_dir()
        except OSError as e:
            raise DataError(
                f"[data] {str(path)[:40]!r}… is no path ({e.strerror}): a list holds paths; give texts as an iterator, "
                "such as iter(texts)"
            ) from None
        if is_folder:
            found = sorted(f for f in path.rglob("*") if f.name.lower().endswith(endings) and f.is_file())
            if not found:
                raise DataError(
                    f"[data] the folder {path} holds no file of {', '.join(endings)}; name another one"
                )
        elif glob.has_magic(str(path)) and not path.exists():
            found = sorted(f for f in map(Path, glob.glob(str(path), recursive=True)) if f.is_file())
            if not found:
                raise DataError(f"[data] no file matches {path}; check the pattern")
        else:
            found = [path]
        files += found
    return files


def size_of(source: Sequence[str | PathLike[str]]) -> int:
    """Bytes on the disk of the files that a source names; standard input counts as none."""
    return sum(file.stat().st_size for file in expand(source) if file.is_file())


def read_documents(
    source: Source, *, column: str = "text", errors: str = "strict", clean: Sequence[str] = ()
) -> list[str]:
    """All documents of a source in memory; arguments and errors are those of :class:`Documents`.

    Raises:
        DataError: besides, where the cleaning steps leave no document.
    """
    documents = list(Documents(source, column=column, errors=errors, clean=clean))
    if not documents:
        raise DataError("[data] no document is left to learn from; check the source and the cleaning steps")
    return documents


def tokenize(
    tokenizer: Tokenizer, documents: Sequence[str], *, objective: str, threads: int | None = None
) -> Ragged:
    """The ids of documents, without the template's special tokens; but for masked objectives, each ends with the end
    token if there is one."""
    tokenizer = tokenizer.without_truncation()
    ragged = tokenizer.encode_batch(documents, add_special_tokens=False, threads=threads)
    eos = tokenizer.eos_token_id
    if objective.startswith("mlm") or eos is None:
        return ragged
    ids = np.insert(ragged.ids, ragged.offsets[1:], np.uint32(eos))
    return Ragged(ids, ragged.offsets + np.arange(len(ragged) + 1))
