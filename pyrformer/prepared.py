"""Text tokenized once, for many runs: shards of ids that training maps into memory.

A prepared folder holds the tokenizer, ``manifest.json`` and ``shard-00000.safetensors`` …, each with two tensors:
``ids``, U16 or U32 ``[N]``, and ``offsets``, I64 ``[D + 1]``: document d of the shard is
``ids[offsets[d]:offsets[d + 1]]``. The manifest is written after each shard, so a process that is killed goes on behind
the last one: the text before it is read and cleaned again, not tokenized again, and the folder ends up the same to the
byte.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import IO, Any

import numpy as np

from pyrformer import _core
from pyrformer.checkpoint import TOKENIZER, digest, read_json, write_json
from pyrformer.data import OBJECTIVES, Documents, Source, expand, tokenize
from pyrformer.errors import DataError, Error, FileError, InputError
from pyrformer.tokenizers import Tokenizer

MANIFEST, QUARANTINE = "manifest.json", "quarantine.jsonl"
#: Files being written have such names until they are whole.
PARTIAL = ".*.partial"
FORMAT, VERSION = "pyrformer-tokens", 1
ON_CORRUPT = ("fail", "skip", "quarantine")

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
        manifest = _manifest(folder)
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
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Tokenizes a source into a folder of shards, and returns its manifest.

    Memory holds one shard, whatever the size of the source. A folder that an earlier call left unfinished is gone on
    with, where source and options are the same.

    Args:
        source: as :class:`pyrformer.data.Documents` takes it. To go on, an iterable must give the same texts again.
        objective: "ar": each document ends with the end token, if the tokenizer has one; "mlm": without it.
        column, errors, clean: as for :class:`pyrformer.data.Documents`.
        on_corrupt: what cannot be read is an error ("fail"), left out ("skip"), or left out and written to
            ``quarantine.jsonl`` with the reason ("quarantine"). The manifest counts it.
        shard_tokens: a shard ends after the megabyte of text that brings it to so many tokens.
        threads: default: all cores.
        progress: told how far the work is, about once per megabyte.

    Raises:
        DataError: a source cannot be read, nothing is left of it, or the folder holds something else.
        FileError: the folder cannot be written.
        InputError: an option is unknown or out of range.
    """
    for name, value, known in (("objective", objective, OBJECTIVES), ("on_corrupt", on_corrupt, ON_CORRUPT)):
        if value not in known:
            raise InputError(f"[prepare] {name} must be one of {', '.join(known)}, got {value!r}")
    if shard_tokens < 1:
        raise InputError(f"[prepare] shard_tokens must be at least 1, got {shard_tokens}")
    folder = Path(out)
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "complete": False,
        "sources": describe(source),
        "options": {
            "objective": objective,
            "column": column,
            "errors": errors,
            "clean": list(clean),
            "on_corrupt": on_corrupt,
            "shard_tokens": shard_tokens,
        },
        "tokenizer_sha256": _identity(tokenizer),
        "vocab_size": tokenizer.vocab_size,
        "shards": [],
    }
    try:
        done = _begun(folder, manifest)
        return done if done["complete"] else _completed(folder, done, source, tokenizer, threads, progress)
    except OSError as e:
        if isinstance(e, Error):
            raise
        raise FileError(f"[prepare] {e.filename or folder}: {e.strerror or e}") from None


def _completed(
    folder: Path,
    manifest: dict[str, Any],
    source: Source,
    tokenizer: Tokenizer,
    threads: int | None,
    progress: Progress | None,
) -> dict[str, Any]:
    """Does what is left to do, and gives the manifest, complete."""
    # What a killed run was writing.
    for left in folder.glob(PARTIAL):
        left.unlink()
    # First, so that a run killed behind it finds a folder it may go on with.
    write_json(folder / MANIFEST, manifest)
    # Into the folder: tokenizer.json alone does not say which token ends a text.
    tokenizer.save(folder)
    o = manifest["options"]
    kept = (
        (folder / f".{QUARANTINE}.partial").open("w", encoding="utf-8")
        if o["on_corrupt"] == "quarantine"
        else None
    )
    try:
        work = _Work(folder, manifest, tokenizer, threads, progress)
        reject = None if o["on_corrupt"] == "fail" else work.rejecting(kept)
        reading = {name: o[name] for name in ("column", "errors", "clean")}
        documents = Documents(source, **reading, on_corrupt=reject)
        work.run(documents)
    finally:
        if kept is not None:
            kept.close()
    if kept is not None:
        # Replaced as a whole: a run that was killed left only the hidden file.
        Path(kept.name).replace(folder / QUARANTINE)
    return work.finish(documents)


def _identity(tokenizer: Tokenizer) -> str:
    """SHA-256 of what a tokenizer does to texts, and of the roles of its tokens."""
    roles = json.dumps(tokenizer.special_tokens(), sort_keys=True)
    return hashlib.sha256((tokenizer.to_json() + roles).encode()).hexdigest()


class _Work:
    """Chunks in, shards out."""

    def __init__(
        self,
        folder: Path,
        manifest: dict[str, Any],
        tokenizer: Tokenizer,
        threads: int | None,
        progress: Progress | None,
    ):
        self.folder, self.manifest, self.tokenizer = folder, manifest, tokenizer
        self.threads, self.progress = threads, progress
        self.ids: list[Any] = []
        self.lengths: list[Any] = []
        self.held = self.rejected = 0
        self.documents = sum(shard["documents"] for shard in manifest["shards"])
        self.tokens = sum(shard["tokens"] for shard in manifest["shards"])

    def rejecting(self, kept: IO[str] | None) -> Callable[[str, str], None]:
        """Counts what cannot be read, and writes it down where it is kept."""

        def reject(reason: str, raw: str) -> None:
            self.rejected += 1
            if kept is not None:
                kept.write(json.dumps({"reason": reason, "text": raw}, ensure_ascii=False) + "\n")

        return reject

    def run(self, documents: Documents) -> None:
        shards, options = self.manifest["shards"], self.manifest["options"]
        behind = shards[-1]["chunks"] if shards else 0
        number = 0
        for number, chunk in enumerate(documents.chunks(), 1):
            cleaned = documents.clean(chunk)
            if number > behind:
                ragged = tokenize(
                    self.tokenizer, cleaned, objective=options["objective"], threads=self.threads
                )
                self.ids.append(ragged.ids)
                self.lengths.append(np.diff(ragged.offsets))
                self.held += len(ragged.ids)
                self.documents += len(ragged)
                self.tokens += len(ragged.ids)
                if self.held >= options["shard_tokens"]:
                    self._write(number)
            if self.progress is not None:
                self.progress(documents.bytes_read, self.documents, self.tokens)
        if number < behind:
            raise DataError(
                f"[prepare] the source is shorter than what {self.folder} was made of; prepare it into another folder"
            )
        if self.held:
            self._write(number)

    def _write(self, chunks: int) -> None:
        """A shard of what is held, and the manifest behind it."""
        ids, lengths = np.concatenate(self.ids), np.concatenate(self.lengths)
        name = f"shard-{len(self.manifest['shards']):05d}.safetensors"
        path = self.folder / name
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        _core.write_shard(path, ids, offsets, self.tokenizer.vocab_size)
        self.manifest["shards"].append(
            {
                "file": name,
                "documents": len(lengths),
                "tokens": len(ids),
                "chunks": chunks,
                "bytes": path.stat().st_size,
                "sha256": digest(path),
            }
        )
        write_json(self.folder / MANIFEST, self.manifest)
        self.ids, self.lengths, self.held = [], [], 0

    def finish(self, documents: Documents) -> dict[str, Any]:
        """The manifest, complete."""
        if not self.manifest["shards"]:
            raise DataError("[prepare] no document is left of the source; check it and the cleaning steps")
        counts = [dict(vars(step)) for step in documents.report]
        self.manifest |= {
            "documents": self.documents,
            "tokens": self.tokens,
            "rejected": self.rejected,
            "cleaning": counts,
            "complete": True,
        }
        write_json(self.folder / MANIFEST, self.manifest)
        return self.manifest


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
    found = _manifest(folder)
    for key in ("version", "sources", "options", "tokenizer_sha256"):
        if found.get(key) != manifest[key]:
            what = {"tokenizer_sha256": "another tokenizer"}.get(key, f"other {key}")
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


def _manifest(folder: Path) -> dict[str, Any]:
    """
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
    fields = {"file": str, "documents": int, "tokens": int, "chunks": int, "bytes": int, "sha256": str}
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
