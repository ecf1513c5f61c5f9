"""Text tokenized once, for many runs: shards of ids that training maps into memory.

A prepared folder holds the tokenizer, ``manifest.json`` and ``shard-00000.safetensors`` …, each with two tensors:
``ids``, U16 or U32 ``[N]``, and ``offsets``, I64 ``[D + 1]``: document d of the shard is
``ids[offsets[d]:offsets[d + 1]]``. The manifest is written after each shard, so a process that is killed goes on behind
the last one: the text before it is read and cleaned again and compared by its SHA-256, not tokenized again, and the
folder ends up the same to the byte.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np

from pyrformer import _core
from pyrformer.checkpoint import TOKENIZER, digest, read_json, write_json
from pyrformer.data.documents import OBJECTIVES, Documents, Source, expand, tokenize
from pyrformer.errors import DataError, Error, FileError, InputError
from pyrformer.fields import checked
from pyrformer.tokenizers import Ragged, Tokenizer

MANIFEST, QUARANTINE = "manifest.json", "quarantine.jsonl"
#: Files being written have such names until they are whole.
PARTIAL = ".*.partial"
FORMAT, VERSION = "pyrformer-tokens", 2
ON_CORRUPT = ("fail", "skip", "quarantine")
ENGINES = ("local", "ray")

T = TypeVar("T")
#: Told how far the work is: bytes of the files read, documents, tokens.
Progress = Callable[[int, int, int], None]


@dataclass(frozen=True)
class Prepared:
    """A prepared folder.

    Attributes:
        folder: where it is.
        manifest: what ``manifest.json`` says: sources, options, shards with their counts and SHA-256.
        tokenizer: the one that made the ids.
        corpus: the ids, memory-mapped.
    """

    folder: Path
    manifest: dict[str, Any]
    tokenizer: Tokenizer
    corpus: _core.Corpus

    @classmethod
    def open(cls, folder: str | PathLike[str], *, verify: bool = False) -> Prepared:
        """
        Args:
            verify: compare each shard with its SHA-256; reads all of them.

        Raises:
            DataError: the folder was not prepared, not to the end, or is not as it was written.
            FileError: it lacks its tokenizer.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        if not manifest["complete"]:
            raise DataError(f"[data] {folder} is not complete; run `pyrformer prepare` again, it goes on")
        for shard in manifest["shards"]:
            _check_shard(folder, shard, verify=verify)
        tokenizer = Tokenizer.load(folder / TOKENIZER)
        if _identity(tokenizer) != manifest["tokenizer_sha256"]:
            raise DataError(
                f"[data] {folder / TOKENIZER} is not the tokenizer of the shards; prepare them again"
            )
        corpus = _core.Corpus.open([folder / shard["file"] for shard in manifest["shards"]])
        return cls(folder, manifest, tokenizer, corpus)

    @property
    def sha256(self) -> str:
        """What identifies the ids and their order."""
        shards = "".join(shard["sha256"] for shard in self.manifest["shards"])
        return hashlib.sha256(shards.encode()).hexdigest()


def is_prepared(path: str | PathLike[str]) -> bool:
    """Whether a path is a folder that :func:`prepare` wrote or began to write."""
    try:
        return bool(read_json(Path(path) / MANIFEST).get("format") == FORMAT)
    except OSError:
        return False


@checked("prepare", shard_tokens=1, threads=1)
def prepare(
    source: Source,
    out: str | PathLike[str],
    tokenizer: Tokenizer,
    *,
    objective: str = "ar",
    column: str = "text",
    errors: str = "strict",
    clean: Sequence[str] = (),
    on_corrupt: str = "fail",
    shard_tokens: int = 1 << 25,
    threads: int | None = None,
    engine: str = "local",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Tokenizes a source into a folder of shards, and returns its manifest.

    Memory holds one shard, whatever the size of the source. A folder that an earlier call left unfinished is gone on
    with, where source and options are the same.

    Args:
        source: as :class:`pyrformer.Documents` takes it. To go on, an iterable must give the same texts again.
        objective: "ar": each document ends with the end token, if the tokenizer has one; "mlm": without it.
        column, errors, clean: as for :class:`pyrformer.Documents`.
        on_corrupt: what cannot be read is an error ("fail"), left out ("skip"), or left out and written to
            ``quarantine.jsonl`` with the reason ("quarantine"). The manifest counts it.
        shard_tokens: a shard ends after the megabyte of text that brings it to so many tokens.
        threads: default: all cores.
        engine: "local", or "ray": workers of a Ray cluster tokenize; the folder is the same to the byte. See
            :mod:`pyrformer.data.cluster`.
        progress: told how far the work is, about once per megabyte.

    Raises:
        DataError: a source cannot be read, nothing is left of it, or the folder holds something else.
        FileError: the folder cannot be written.
        InputError: an option is unknown or out of range.
    """
    options = {
        "objective": objective,
        "column": column,
        "errors": errors,
        "clean": list(clean),
        "on_corrupt": on_corrupt,
        "shard_tokens": shard_tokens,
    }
    work = Preparation(source, out, tokenizer, options, threads, engine)
    return work.manifest if work.manifest["complete"] else work.run(progress)


class Closed(Exception):
    """Work that goes on although it was closed."""


class Preparation:
    """Chunks of text in, shards out: the work on a prepared folder. Another thread may follow its manifest.

    Attributes:
        folder: where it is.
        manifest: what is done; a shard appears in it when it is on the disk.
        threads: for the next chunk.
        verified: how many shards are known to be made of this text.
    """

    def __init__(
        self,
        source: Source,
        out: str | PathLike[str],
        tokenizer: Tokenizer,
        options: dict[str, Any],
        threads: int | None = None,
        engine: str = "local",
    ):
        """Looks at what is there; nothing is written but the folder itself.

        Args:
            options: all those of :func:`prepare` that the manifest holds.

        Raises:
            DataError, FileError, InputError: as :func:`prepare`.
        """
        for name, known in (("objective", OBJECTIVES), ("on_corrupt", ON_CORRUPT)):
            if options[name] not in known:
                raise InputError(f"[prepare] {name} must be one of {', '.join(known)}, got {options[name]!r}")
        if engine not in ENGINES:
            raise InputError(f"[prepare] engine must be one of {', '.join(ENGINES)}, got {engine!r}")
        if options["shard_tokens"] < 1:
            raise InputError(f"[prepare] shard_tokens must be at least 1, got {options['shard_tokens']}")
        self.source, self.tokenizer, self.threads, self.engine = source, tokenizer, threads, engine
        self.folder, self.verified = Path(out), 0
        self._lock, self._closed = threading.Lock(), False
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "complete": False,
            "sources": describe(source),
            "options": options,
            "tokenizer_sha256": _identity(tokenizer),
            "vocab_size": tokenizer.vocab_size,
            "shards": [],
        }
        with _named(self.folder):
            self.manifest = _begun(self.folder, manifest)

    @contextmanager
    def moving(self, to: Path, then: Path) -> Iterator[None]:
        """Renames the folder to ``to`` between two writes; after the block it is to be found at ``then``."""
        with self._lock:
            self.folder.rename(to)
            self.folder = to
            yield
            self.folder = then

    def run(self, progress: Progress | None = None) -> dict[str, Any]:
        """Does what is left to do, and gives the manifest, complete. Of a complete folder, the text is compared.

        Args:
            progress: as for :func:`prepare`; what it raises ends the work, to be gone on with.

        Raises:
            DataError, FileError: as :func:`prepare`; the text is another one than that of the shards.
        """
        with _named(self.folder):
            return self._run(progress)

    def _run(self, progress: Progress | None) -> dict[str, Any]:
        o = self.manifest["options"]
        if not self.manifest["complete"]:
            with self._writing():
                # What a killed run was writing.
                for left in self.folder.glob(PARTIAL):
                    left.unlink()
                # First, so that a run killed behind it finds a folder it may go on with.
                write_json(self.folder / MANIFEST, self.manifest)
                # Into the folder: tokenizer.json alone does not say which token ends a text.
                self.tokenizer.save(self.folder)
        aside = self.folder / f".{QUARANTINE}.partial"
        kept = aside.open("w", encoding="utf-8") if o["on_corrupt"] == "quarantine" else None
        try:
            work = _Work(self, kept, progress)
            reading = {name: o[name] for name in ("column", "errors", "clean")}
            reject = None if o["on_corrupt"] == "fail" else work.reject
            documents = Documents(self.source, **reading, on_corrupt=reject)
            work.run(documents)
        finally:
            if kept is not None:
                kept.close()
        if kept is not None:
            # Replaced as a whole: a run that was killed left only the hidden file.
            aside.replace(self.folder / QUARANTINE)
        if not self.manifest["complete"]:
            work.finish(documents)
        return self.manifest

    def add(self, ids: Any, offsets: Any, chunks: int, text_sha256: str) -> None:
        """Writes a shard, and the manifest behind it."""
        name = f"shard-{len(self.manifest['shards']):05d}.safetensors"
        with self._writing():
            path = self.folder / name
            _core.write_shard(path, ids, offsets, self.tokenizer.vocab_size)
            shard = {
                "file": name,
                "documents": len(offsets) - 1,
                "tokens": len(ids),
                "chunks": chunks,
                "text_sha256": text_sha256,
                "bytes": path.stat().st_size,
                "sha256": digest(path),
            }
            self._tell({"shards": [*self.manifest["shards"], shard]})
            self.verified = len(self.manifest["shards"])

    def complete(self, counts: dict[str, Any]) -> None:
        """Writes the manifest of a folder that is whole."""
        with self._writing():
            self._tell({**counts, "complete": True})

    def close(self) -> None:
        """Writes nothing more; another thread's :meth:`run` ends when it comes to write."""
        with self._lock:
            self._closed = True

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with self._lock:
            if self._closed:
                raise Closed
            yield

    def _tell(self, more: dict[str, Any]) -> None:
        # A new one: who follows it never sees one that is being changed.
        manifest = {**self.manifest, **more}
        write_json(self.folder / MANIFEST, manifest)
        self.manifest = manifest

    def corpus(self) -> tuple[_core.Corpus, bool]:
        """The shards that are verified, and whether they are all there will be."""
        with self._lock:
            manifest, verified = self.manifest, self.verified
            corpus = _core.Corpus.open(
                [self.folder / shard["file"] for shard in manifest["shards"][:verified]]
            )
        return corpus, manifest["complete"] and verified == len(manifest["shards"])


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    """Gives errors of the operating system the name of the file, or of the folder."""
    try:
        yield
    except OSError as e:
        if isinstance(e, Error):
            raise
        raise FileError(f"[prepare] {e.filename or folder}: {e.strerror or e}") from None


def _identity(tokenizer: Tokenizer) -> str:
    """SHA-256 of what a tokenizer does to texts, and of the roles of its tokens."""
    roles = json.dumps(tokenizer.special_tokens(), sort_keys=True)
    return hashlib.sha256((tokenizer.to_json() + roles).encode()).hexdigest()


class _Work:
    """One run over the chunks of a source."""

    def __init__(self, preparation: Preparation, kept: IO[str] | None, progress: Progress | None):
        self.to, self.kept, self.progress = preparation, kept, progress
        self.shards = list(preparation.manifest["shards"])
        self.ids: list[Any] = []
        self.lengths: list[Any] = []
        self.held = self.rejected = 0
        self.documents = sum(shard["documents"] for shard in self.shards)
        self.tokens = sum(shard["tokens"] for shard in self.shards)
        #: Of all text so far, before cleaning.
        self.text = hashlib.sha256()

    def reject(self, reason: str, raw: str) -> None:
        """Counts what cannot be read, and writes it down where it is kept."""
        self.rejected += 1
        if self.kept is not None:
            self.kept.write(json.dumps({"reason": reason, "text": raw}, ensure_ascii=False) + "\n")

    def run(self, documents: Documents) -> None:
        number = 0

        def chunks() -> Iterator[tuple[tuple[int, str], list[str]]]:
            """Those to be tokenized, each with its number and what identifies the text up to its end."""
            nonlocal number
            for number, chunk in enumerate(documents.chunks(), 1):
                self.text.update("\0".join([*chunk, ""]).encode("utf-8", "surrogatepass"))
                cleaned = documents.clean(chunk)
                if self.to.verified < len(self.shards):
                    self._compare(number)
                elif not self.to.manifest["complete"]:
                    yield (number, self.text.hexdigest()), cleaned
                self._tell(documents)

        for place, ragged in self._tokenized(chunks()):
            self._take(ragged, *place)
        self._tell(documents)
        whole = self.to.manifest.get("text_sha256", self.text.hexdigest())
        if self.to.verified < len(self.shards) or self.text.hexdigest() != whole:
            raise self._another()
        if self.held:
            self._write(number, self.text.hexdigest())

    def _tell(self, documents: Documents) -> None:
        if self.progress is not None:
            self.progress(documents.bytes_read, self.documents, self.tokens)

    def _another(self) -> DataError:
        return DataError(
            f"[prepare] {self.to.folder} was made of another text than its sources hold; give that text again, or name "
            "another folder"
        )

    def _compare(self, chunk: int) -> None:
        """Compares the text up to the end of a shard that is there."""
        shard = self.shards[self.to.verified]
        if chunk == shard["chunks"]:
            if self.text.hexdigest() != shard["text_sha256"]:
                raise self._another()
            self.to.verified += 1

    def _tokenized(self, chunks: Iterator[tuple[T, list[str]]]) -> Iterator[tuple[T, Ragged]]:
        """The ids of chunks, in their order."""
        tokenizer, objective = self.to.tokenizer, self.to.manifest["options"]["objective"]
        if self.to.engine == "ray":
            from pyrformer.data.cluster import tokenized

            return tokenized(chunks, tokenizer, objective)
        return (
            (place, tokenize(tokenizer, texts, objective=objective, threads=self.to.threads))
            for place, texts in chunks
        )

    def _take(self, ragged: Ragged, chunk: int, text_sha256: str) -> None:
        self.ids.append(ragged.ids)
        self.lengths.append(np.diff(ragged.offsets))
        self.held += len(ragged.ids)
        self.documents += len(ragged)
        self.tokens += len(ragged.ids)
        if self.held >= self.to.manifest["options"]["shard_tokens"]:
            self._write(chunk, text_sha256)

    def _write(self, chunks: int, text_sha256: str) -> None:
        """A shard of what is held."""
        ids, lengths = np.concatenate(self.ids), np.concatenate(self.lengths)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self.to.add(ids, offsets, chunks, text_sha256)
        self.ids, self.lengths, self.held = [], [], 0

    def finish(self, documents: Documents) -> None:
        """The last of the manifest."""
        if not self.to.manifest["shards"]:
            raise DataError("[prepare] no document is left of the source; check it and the cleaning steps")
        cleaning = [dict(vars(step)) for step in documents.report]
        counts = {"documents": self.documents, "tokens": self.tokens, "rejected": self.rejected}
        self.to.complete({**counts, "cleaning": cleaning, "text_sha256": self.text.hexdigest()})


def describe(source: Any) -> list[dict[str, Any]]:
    """What a source is made of, as far as that can be known before it is read."""
    if isinstance(source, (str, PathLike)):
        source = [source]
    if not isinstance(source, (list, tuple)):
        return [{"kind": type(source).__name__}]
    known: list[dict[str, Any]] = []
    for path in expand(source):
        if str(path) == "-":
            known.append({"path": "-"})
        elif not path.is_file():
            raise DataError(f"[data] {path} does not exist; check the path")
        else:
            known.append({"path": str(path), "bytes": path.stat().st_size})
    return known


def _begun(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest to go on with: the one that is there, without shards that are not whole, or the new one."""
    if not folder.exists() or all(path.match(PARTIAL) for path in folder.iterdir()):
        folder.mkdir(parents=True, exist_ok=True)
        return manifest
    if not is_prepared(folder):
        raise DataError(f"[prepare] {folder} holds something else; name a new folder")
    found = read_manifest(folder)
    for key in ("version", "sources", "options", "tokenizer_sha256"):
        if found.get(key) != manifest[key]:
            what = {"tokenizer_sha256": "another tokenizer", "sources": "another text"}.get(
                key, f"other {key}"
            )
            raise DataError(f"[prepare] {folder} was begun with {what}; name a new folder")
    if not found["complete"]:
        for number, shard in enumerate(found["shards"]):
            try:
                _check_shard(folder, shard, verify=True)
            except DataError:
                # This one and those behind it are made again.
                del found["shards"][number:]
                break
    return found


def read_manifest(folder: Path) -> dict[str, Any]:
    """What ``manifest.json`` says, checked.

    Raises:
        DataError: it cannot be read, or is not a manifest.
    """
    try:
        manifest = read_json(folder / MANIFEST)
    except OSError as e:
        raise DataError(
            f"[data] {folder} is no prepared folder ({e}); make one with `pyrformer prepare`"
        ) from e
    shards = manifest.get("shards")
    fields = {"file": str, "documents": int, "tokens": int, "chunks": int, "bytes": int}
    fields |= {"sha256": str, "text_sha256": str}
    whole = (
        manifest.get("format") == FORMAT
        and manifest.get("version") == VERSION
        and isinstance(manifest.get("complete"), bool)
        and isinstance(manifest.get("tokenizer_sha256"), str)
        and isinstance(manifest.get("options"), dict)
        and isinstance(shards, list)
        and all(isinstance(s, dict) and all(type(s.get(k)) is t for k, t in fields.items()) for s in shards)
    )
    if not whole or any(Path(shard["file"]).name != shard["file"] for shard in shards or ()):
        raise DataError(
            f"[data] {folder / MANIFEST} is not a manifest of this version; prepare the text again"
        )
    return manifest


def _check_shard(folder: Path, shard: dict[str, Any], *, verify: bool) -> None:
    path = folder / shard["file"]
    size = path.stat().st_size if path.is_file() else None
    if size != shard["bytes"]:
        there = "is missing" if size is None else f"has {size} bytes instead of {shard['bytes']}"
        raise DataError(f"[data] {path} {there}; prepare the text again")
    if verify and digest(path) != shard["sha256"]:
        raise DataError(
            f"[data] {path} is not as it was written (its SHA-256 differs); prepare the text again"
        )
