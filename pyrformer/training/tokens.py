"""Text that is tokenized beside the training that learns from it.

A thread prepares the text into the folder ``tokens`` of the run (:class:`pyrformer.Prepared`); batches are made of the
shards that are there, and waited for where they would be others with more of them. So the batches are those of the
whole text, whenever they are asked for, and memory does not grow with it.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from pyrformer import _core
from pyrformer.batch import Batch
from pyrformer.data.prepared import Closed, Preparation, is_prepared, read_manifest
from pyrformer.errors import DataError, InternalError
from pyrformer.training.comm import Comm, share
from pyrformer.training.folder import TOKENS

#: Tokens of a shard: what is waited for before the first step, and what is lost when a run is killed.
SHARD_TOKENS = 1 << 20
#: Seconds between two looks, at signals and at what another process writes.
PAUSE = 0.02


class Interrupted(Exception):
    """The run is to end; the batch that was waited for is not there."""


class Tokens(Protocol):
    """The shards of a text, as they come.

    Attributes:
        interrupted: whether waiting is to end by :class:`Interrupted`.
    """

    interrupted: Callable[[], bool]

    def corpus(self, more_than: int) -> tuple[_core.Corpus, bool]:
        """All shards so far, once there are more than so many tokens or all; and whether they are all.

        Raises:
            DataError, FileError, TokenizerError: the text cannot be read, tokenized or written.
            Interrupted: see ``interrupted``.
        """

    def check(self) -> None:
        """Raises what went wrong, as :meth:`corpus`."""


class Beside:
    """A thread that tokenizes.

    Attributes:
        work: what it does.
    """

    def __init__(self, work: Preparation):
        self.work = work
        self.interrupted: Callable[[], bool] = lambda: False
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._ends = self._ended = False
        self._thread = threading.Thread(target=self._run, name="pyrformer-tokens", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.work.run(self._told)
        except Closed:
            pass
        except BaseException as e:
            self._error = e
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _told(self, *_: int) -> None:
        if self._ends:
            raise Closed
        with self._changed:
            self._changed.notify_all()

    def check(self) -> None:
        if self._error is not None:
            raise self._error

    def corpus(self, more_than: int) -> tuple[_core.Corpus, bool]:
        seen = -1
        while True:
            with self._changed:
                while self.work.verified == seen and not self._ended:
                    self._changed.wait(PAUSE)
                    if self.interrupted():
                        raise Interrupted
            ended, seen = self._ended, self.work.verified
            self.check()
            corpus, whole = self.work.corpus()
            if whole and ended:
                return corpus, True
            if corpus.tokens > more_than:
                # Training begins: it has the cores from here on.
                self.work.threads = 1
                return corpus, False
            if ended:
                raise InternalError("[train] the text is at its end, but not all of its tokens are there")

    def close(self) -> None:
        """Ends the thread; what is left to do is done when the run goes on. One that waits for standard input is left
        behind."""
        self._ends = True
        self.work.close()
        self._thread.join(1.0)


class Followed:
    """The shards that another process writes into a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.interrupted: Callable[[], bool] = lambda: False

    def check(self) -> None:
        pass

    def corpus(self, more_than: int) -> tuple[_core.Corpus, bool]:
        while True:
            if is_prepared(self.folder):
                manifest = read_manifest(self.folder)
                whole = manifest["complete"]
                if whole or sum(shard["tokens"] for shard in manifest["shards"]) > more_than:
                    paths = [self.folder / shard["file"] for shard in manifest["shards"]]
                    return _core.Corpus.open(paths), whole
            time.sleep(PAUSE)


class There:
    """A text all of which is tokenized."""

    def __init__(self, corpus: _core.Corpus):
        self._corpus = corpus
        self.interrupted: Callable[[], bool] = lambda: False

    def check(self) -> None:
        pass

    def corpus(self, more_than: int) -> tuple[_core.Corpus, bool]:
        return self._corpus, True


class Place:
    """Where the tokens of a run are: in its folder, and beside it as long as there is none.

    Attributes:
        folder: where they are.
    """

    def __init__(self, run: Path, comm: Comm, *, exists: bool):
        self._comm, self._beside = comm, not exists
        self._tokens: Tokens | None = None
        self.folder = run / TOKENS
        if self._beside:
            # Below the closest folder that is there: a run that does not begin leaves no folders behind.
            above = next(parent for parent in run.absolute().parents if parent.exists())
            if comm.rank == 0:
                _remove_left(above, run.name)
            self.folder = above / f".{run.name}.{TOKENS}.{os.getpid()}.partial"

    def begin(self, make: Callable[[Path], Preparation]) -> Tokens:
        """Begins to tokenize, in the first process; the others follow it."""
        begun: list[Tokens] = []

        def first() -> Path:
            begun.append(Beside(make(self.folder)))
            return self.folder

        self.folder = share(self._comm, first)
        self._tokens = begun[0] if begun else Followed(self.folder)
        return self._tokens

    @contextmanager
    def moving(self, partial: Path, run: Path) -> Iterator[None]:
        """Puts the tokens into the folder of a run that gets its name within the block."""
        if isinstance(self._tokens, Beside) and self._beside:
            with self._tokens.work.moving(partial / TOKENS, run / TOKENS):
                yield
            self.folder, self._beside = run / TOKENS, False
        else:
            yield

    def moved(self, run: Path) -> None:
        """Told to the processes that follow, when the first one has moved them."""
        if isinstance(self._tokens, Followed):
            self._tokens.folder = run / TOKENS

    def close(self) -> None:
        """Ends the work; tokens that are in no run's folder are removed."""
        if isinstance(self._tokens, Beside):
            self._tokens.close()
        if self._beside and self._comm.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)


def _remove_left(above: Path, run: str) -> None:
    """Removes what processes that were killed on this machine left of a run that had not begun."""
    for path in above.glob(".*.partial"):
        found = re.fullmatch(
            rf"\.{re.escape(run)}\.(?:{TOKENS}\.)?(\d{{1,18}})(?:-[0-9a-f-]+)?\.partial", path.name
        )
        if found and path.is_dir() and not _runs(int(found[1])):
            shutil.rmtree(path, ignore_errors=True)


def _runs(process: int) -> bool:
    """Whether a process may be running."""
    if sys.platform == "win32":
        return True  # there, this question would end it
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


class SomeBatches(Protocol):
    """Batches of a corpus, of which the first ``settled_steps`` would be the same for a longer one."""

    @property
    def settled_steps(self) -> int: ...
    @property
    def batches_per_pass(self) -> int: ...
    def documents(self, step: int) -> list[list[int]]: ...
    def ready(self, step: int) -> Batch: ...


class Growing:
    """The batches of a text that is still being tokenized: each is the one of the whole text."""

    def __init__(self, tokens: Tokens, make: Callable[[_core.Corpus], tuple[_core.Corpus, Any]]):
        """
        Args:
            make: of the tokens so far, the corpus to make batches of, and the batches.
        """
        self._tokens, self._make = tokens, make
        self._tokens_seen, self._whole = 0, False
        self._corpus: _core.Corpus | None = None
        self._batches: SomeBatches | None = None

    def _of(self, step: int | None) -> SomeBatches:
        """Batches that are right for a step; None: for all."""
        self._tokens.check()
        while not self._whole:
            batches = self._batches
            if batches is not None and step is not None and step < batches.settled_steps:
                return batches
            corpus, self._whole = self._tokens.corpus(self._tokens_seen)
            self._tokens_seen = corpus.tokens
            try:
                self._corpus, self._batches = self._make(corpus)
            except DataError:
                # Too short for one batch, so far.
                if self._whole:
                    raise
        assert self._batches is not None, "a whole text has batches, or an error was raised"
        return self._batches

    @property
    def batches_per_pass(self) -> int:
        """How many batches visit all text once; waits for all of it."""
        return self._of(None).batches_per_pass

    @property
    def known(self) -> bool:
        """Whether all text is there."""
        return self._whole

    def count(self) -> int:
        """How many tokens there are; waits for all."""
        self._of(None)
        return 0 if self._corpus is None else self._corpus.tokens

    def documents(self, step: int) -> list[list[int]]:
        """The numbers of the documents in each row of a step, among all of the text."""
        rows = self._of(step).documents(step)
        corpus = self._corpus
        return [[corpus.number(d) if corpus else d for d in row] for row in rows]

    def ready(self, step: int) -> Batch:
        """The batch of a step."""
        return self._of(step).ready(step)


def counted(batches: Any, evaluation: Any) -> dict[str, int]:
    """How many tokens there are to learn from and to measure on, once all text that was to be tokenized is."""
    both = {"train_tokens": batches, "valid_tokens": evaluation}
    growing = {name: b for name, b in both.items() if isinstance(b, Growing)}
    if not any(b.known for b in growing.values()):
        return {}
    return {name: b.count() for name, b in growing.items()}
