"""One thread that decodes all requests under way together: continuous batching.

A request is a search of its own, with options of its own, and takes as many rows of the key-value cache as it returns
sequences. Before each step the thread admits waiting requests, in their order, while rows are free; then the model
reads the last tokens of all sequences under way in one pass, after the prompts of those that are new. So a request
enters while others run, and leaves when it ends. Prompts are read in pieces of :data:`PIECE` tokens between the steps
of the others, so a long one delays them by a piece at a time.

A sequence's tokens are those of ``model.generate`` alone: no bit of a row depends on the rows beside it.

Letters: A active sequences, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pyrformer import _core
from pyrformer.errors import Error, InternalError
from pyrformer.fields import out_of_memory
from pyrformer.generation.call import ending
from pyrformer.generation.decoder import BEST, Decoder, Floats, Following, Ints, Positions, log_softmax
from pyrformer.generation.strategies import Sequences
from pyrformer.model import Model

#: Texts that are embedded between two decoding steps.
EMBEDDED = 64
#: Tokens of prompts that are read between two decoding steps.
PIECE = 128


class Full(Error, RuntimeError):
    """The queue has no room.

    Attributes:
        seconds: after so many it may have.
    """

    def __init__(self, seconds: int):
        super().__init__("[serve] too many requests are waiting; try again later")
        self.seconds = seconds


class Stopping(Error, RuntimeError):
    """The server is about to end."""


class TimedOut(Error, TimeoutError):
    """A request took longer than it may."""


@dataclass(frozen=True)
class Token:
    """A token of a completion.

    Attributes:
        sequence: which of the request's completions it belongs to.
        id: the token.
        logprob: the model's own log-probability, nats.
        top: the most probable tokens at its place with their log-probabilities, as many as were asked for.
    """

    sequence: int
    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Echo:
    """A prompt that was read.

    Attributes:
        tokens: those of the prompt, ``sequence`` 0; with log-probabilities if asked for, NaN for the first.
    """

    tokens: list[Token]


@dataclass(eq=False)
class Completion:
    """A request to continue one prompt.

    Attributes:
        prompt: its ids.
        options: of :func:`pyrformer.generation.generate.generate`, ready for the search.
        stops: strings that end a sequence.
        first: the number of its first sequence in the coordinates of draws.
        top: how many alternatives of each token to report.
        seconds: how long it may take, waiting included.
        tell: called by the engine's thread with tokens as they become certain; then once with the finish reason of
            each sequence, or with the error that ended the request.
        echo: whether to tell the prompt first; ``scored``: with its log-probabilities.
    """

    prompt: list[int]
    options: dict[str, Any]
    stops: list[str]
    first: int
    top: int
    seconds: float
    tell: Callable[[list[Token] | list[str] | Echo | Error], None]
    echo: bool = False
    scored: bool = False
    cancelled: bool = False
    deadline: float = field(default=math.inf, init=False)

    @property
    def rows(self) -> int:
        """Cache rows that it needs."""
        return int(self.options.get("num_return_sequences", 1))


@dataclass(eq=False)
class Embedding:
    """A request for the vectors of texts, which are ids; ``tell`` gets float32 ``[N, C]``, or the error."""

    texts: list[list[int]]
    seconds: float
    tell: Callable[[npt.NDArray[np.float32] | Error], None]
    cancelled: bool = False
    deadline: float = field(default=math.inf, init=False)


class Running:
    """A completion under way."""

    def __init__(self, request: Completion, model: Model, slots: int, rows: Ints):
        self.request, self.rows = request, rows
        place = (request.prompt, 0, request.first)
        ends = ending(model, request.stops, None) if request.stops else None
        search = _core.Search(request.options, [place], model.family.config.vocab_size, None, None, ends)
        self.sequences = Sequences(search, Positions(1, slots))
        self.began = time.monotonic()
        #: What the active sequences have yet to read before the next step, and their numbers.
        self.unread: tuple[list[list[int]], Ints] | None = None
        #: Of the prompt, what is known so far; and whether it was told.
        self.prompt: list[Token] = []
        self.told = not request.echo

    def score(self, piece: list[int], logits: Floats) -> None:
        """Takes the logits [T, V] behind each token of a piece of the prompt: how probable its successor is."""
        self.prompt = self.prompt or [Token(0, piece[0], math.nan)]
        for row in logits[: len(self.request.prompt) - len(self.prompt)]:
            values, token = log_softmax(row), self.request.prompt[len(self.prompt)]
            top = _top(row, self.request.top) if self.request.top else ()
            self.prompt.append(Token(0, token, float(values[token]), top))

    def echo(self) -> None:
        """Tells the prompt, once."""
        if not self.told:
            self.told = True
            self.request.tell(Echo(self.prompt or [Token(0, t, math.nan) for t in self.request.prompt]))

    def temperatures(self, vocab_size: int) -> list[float | None]:
        """For each active sequence the temperature at which the best of its logits are to be weighed; None: they are
        looked at whole."""
        best = None if self.request.top else self.sequences.search.wants_best(min(BEST, vocab_size))
        return [best] * len(self.sequences.positions.lengths)

    def tokens(self, following: Following) -> list[Token]:
        """Goes on with what follows the active sequences."""
        wanted = self.sequences.wanted
        emitted = self.sequences.take(following)
        if not self.request.top or wanted is None:
            return [Token(*e) for e in emitted]
        logits = following.rows(range(following.count))
        # At the first step one row, the prompt's, speaks for all sequences.
        row = {int(s): i for i, s in enumerate(wanted[3])} if wanted[0] > 0 else {}
        return [Token(*e, _top(logits[row.get(e[0], 0)], self.request.top)) for e in emitted]

    def reasons(self) -> list[str]:
        """Why each sequence ended."""
        return [r["finish_reason"] for r in self.sequences.search.finish()]


def _top(logits: Floats, k: int) -> tuple[tuple[int, float], ...]:
    values = log_softmax(logits)
    return tuple((int(i), float(values[i])) for i in np.argsort(-values, kind="stable")[:k])


class Engine:
    """The thread and its queue.

    Args:
        model: what it serves.
        rows: sequences that are decoded together at most.
        slots: tokens of a sequence, prompt included, at most.
        waiting: requests that wait at most.
    """

    def __init__(self, model: Model, *, rows: int, slots: int, waiting: int):
        self.model, self.rows, self.slots, self.room = model, rows, slots, waiting
        self._decoder = Decoder(model, 0, rows, slots) if model.family.objective == "ar" else None
        self._free = list(range(rows))
        self._running: list[Running] = []
        self._waiting: deque[Completion] = deque()
        self._embeddings: deque[Embedding] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        #: Seconds that a completion takes from its first step to its last, averaged over the latest ones.
        self._seconds = 1.0
        self._thread = threading.Thread(target=self._work, name="pyrformer-serve", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[Completion | Embedding]) -> None:
        """Takes requests into the queue, all or none.

        Raises:
            Full: there is no room.
            Stopping: :meth:`stop` was called.
        """
        with self._changed:
            if self._stopping:
                raise Stopping("[serve] the server is stopping")
            if self.waiting + len(requests) > self.room:
                raise Full(max(1, math.ceil(self._seconds * self.waiting / self.rows)))
            for request in requests:
                request.deadline = time.monotonic() + request.seconds
                if isinstance(request, Embedding):
                    self._embeddings.append(request)
                else:
                    self._waiting.append(request)
            self._changed.notify()

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting) + len(self._embeddings)

    @property
    def running(self) -> int:
        """Completions under way."""
        return len(self._running)

    def stop(self) -> None:
        """Finishes what runs and what waits, takes nothing new, and returns when all is done."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._running or self.waiting or self._stopping):
                    self._changed.wait()
                if not (self._running or self.waiting):
                    return
                embeddings = self._admit()
            if embeddings:
                self._embed(embeddings)
            if self._running:
                self._step()

    def _admit(self) -> list[Embedding]:
        """Lets waiting completions run while there are rows; gives the embeddings that come next."""
        now = time.monotonic()
        self._waiting = deque(r for r in self._waiting if not _given_up(r, now))
        self._embeddings = deque(r for r in self._embeddings if not _given_up(r, now))
        while self._waiting and self._waiting[0].rows <= len(self._free):
            request = self._waiting.popleft()
            rows = np.array([self._free.pop() for _ in range(request.rows)], np.int32)
            try:
                self._running.append(Running(request, self.model, self.slots, rows))
            except Exception as e:
                self._free += rows.tolist()
                request.tell(_as_error(e))
        taken: list[Embedding] = []
        while self._embeddings and sum(len(e.texts) for e in taken) < EMBEDDED:
            taken.append(self._embeddings.popleft())
        return taken

    def _embed(self, requests: list[Embedding]) -> None:
        """All texts go through the model together: no text's vector depends on the others."""
        try:
            vectors = self.model.embed([text for r in requests for text in r.texts])
        except Exception as e:
            for request in requests:
                request.tell(_as_error(e))
            return
        ends = np.cumsum([len(r.texts) for r in requests])
        for request, part in zip(requests, np.split(vectors, ends[:-1]), strict=True):
            request.tell(part)

    def _step(self) -> None:
        now = time.monotonic()
        reading: dict[bool, list[tuple[Running, list[list[int]], Ints]]] = {True: [], False: []}
        for job in list(self._running):
            if _given_up(job.request, now):
                self._leave(job)
                continue
            job.unread = job.unread or job.sequences.feeds()
            if job.unread is None:
                self._leave(job)
                self._seconds += 0.1 * (now - job.began - self._seconds)
                job.request.tell(job.reasons())
                continue
            feeds, sequences = job.unread
            alone = max(map(len, feeds)) > 1 or (job.request.scored and not job.told)
            reading[alone].append((job, feeds, job.rows[sequences]))
        # Prompts one by one: together, the short ones would be padded to the longest.
        room = PIECE
        for job, feeds, into in reading[True]:
            if room > 0:
                whole = len(feeds) > 1 or self.model.family.config.prefix_lm
                taken = feeds if whole else [feeds[0][:room]]
                room -= sum(map(len, taken))
                self._read([(job, taken, into)])
        if reading[False]:
            self._read(reading[False])

    def _read(self, group: list[tuple[Running, list[list[int]], Ints]]) -> None:
        """One pass of the model for the active sequences of some completions."""
        decoder = self._decoder
        if decoder is None:
            raise RuntimeError("completions of a model that does not continue text are never admitted")
        positions = [job.sequences.positions for job, _, _ in group]
        decoder.rows = np.concatenate([p.rows for p in positions])
        decoder.lengths = np.concatenate([p.lengths for p in positions])
        ends = np.cumsum([len(p.lengths) for p in positions])[:-1]
        feeds = [feed for _, feeds, _ in group for feed in feeds]
        scored = not group[0][0].told and group[0][0].request.scored
        into = np.concatenate([into for _, _, into in group])
        try:
            if scored:
                # A power of two: each number of outputs is a program.
                outputs = 1 << (len(feeds[0]) - 1).bit_length()
                logits, _ = decoder.read(feeds, into, outputs=outputs)
                group[0][0].score(feeds[0], logits[0, -len(feeds[0]) :])
                following = Following.whole(logits[:, -1])
            else:
                vocab_size = self.model.family.config.vocab_size
                temperatures = [t for job, _, _ in group for t in job.temperatures(vocab_size)]
                following = decoder.follow_up(feeds, into, temperatures)
        except Exception as e:
            for job, _, _ in group:
                self._leave(job)
                job.request.tell(_as_error(e))
            return
        bounds = [0, *ends.tolist(), len(feeds)]
        parts = [following.part(a, b) for a, b in itertools.pairwise(bounds)]
        tables = (np.split(x, ends) for x in (decoder.rows, decoder.lengths))
        for (job, taken, _), place, rows, lengths, part in zip(group, positions, *tables, parts, strict=True):
            place.rows, place.lengths = rows, lengths
            whole, sequences = job.unread or ([], np.zeros(0, np.int32))
            left = [feed[len(read) :] for feed, read in zip(whole, taken, strict=True)]
            job.unread = (left, sequences) if any(left) else None
            if job.unread is not None:
                continue
            job.echo()
            try:
                tokens = job.tokens(part)
            except Exception as e:
                self._leave(job)
                job.request.tell(_as_error(e))
                continue
            if tokens:
                job.request.tell(tokens)

    def _leave(self, job: Running) -> None:
        self._running.remove(job)
        self._free += job.rows.tolist()


def _given_up(request: Completion | Embedding, now: float) -> bool:
    """Whether a request is over before its end: its client went away, or its time is used up, which it is told."""
    late = now >= request.deadline
    if late and not request.cancelled:
        request.tell(TimedOut(f"[serve] the request took more than {request.seconds:g} seconds"))
    return late or request.cancelled


def _as_error(e: Exception) -> Error:
    if isinstance(e, MemoryError) and not isinstance(e, Error):
        return out_of_memory("serve", e)
    return e if isinstance(e, Error) else InternalError(f"[serve] {type(e).__name__}: {e}")
