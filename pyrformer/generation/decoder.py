"""A model that reads tokens into its key-value cache and says what follows.

Position p of a sequence may lie in any cache row: ``rows [A, S]`` says in which, so that beams share a prefix and a
beam step copies a row of that table, never keys or values. What a sequence has read can be taken back by lowering its
length.

Letters: A active sequences, R cache rows, S cache slots, N outputs a sequence, C width, V vocabulary.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from pyrformer import _core, forks, programs
from pyrformer.compile import Compiled
from pyrformer.errors import InputError
from pyrformer.model import Model

#: Cache slots are made in multiples of this, so that calls of similar length share programs.
SLOTS = 64
#: Of each row of logits a device leaves so many to the search, which asks for the row where they do not suffice.
BEST = 256
#: Seconds after which the core comes back to Python, for signals and clocks.
SLICE = 0.05
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]


def slots_for(
    model: Model, prompts: list[list[int]], max_new_tokens: int | None, max_length: int | None
) -> int:
    """How many cache slots the longest of the prompts and what it may get need, at most the model's positions.

    Raises:
        InputError: a prompt is longer than the model's positions.
    """
    longest, limit = max(map(len, prompts)), model.family.max_positions
    if longest > limit:
        raise InputError(
            f"[generate] a prompt of {longest} tokens is more than the model's {limit} positions"
        )
    wanted = max_new_tokens or max((max_length or longest + 20) - longest, 1)
    return min(-(-(longest + wanted) // SLOTS) * SLOTS, limit)


@dataclass(frozen=True)
class Following:
    """What follows A sequences.

    Attributes:
        count: A.
        rows: gives logits of some of them whole, float32 ``[n, V]``, for ascending numbers.
        best: of each the greatest logits float32 ``[A, K]``, their tokens int32 ``[A, K]``, and what all weigh, float64
            ``[A, 2]``, as :func:`pyrformer.nn.functional.best` has them; None where whole rows are here.
    """

    count: int
    rows: Callable[[Sequence[int]], Floats]
    best: tuple[Floats, Ints, npt.NDArray[np.float64]] | None = None

    @classmethod
    def whole(cls, logits: Floats) -> Following:
        """Of logits ``[A, V]``."""
        return cls(
            len(logits),
            lambda rows: np.ascontiguousarray(logits if len(rows) == len(logits) else logits[list(rows)]),
        )

    def part(self, first: int, end: int) -> Following:
        """What follows some of the sequences."""
        best = self.best and tuple(x[first:end] for x in self.best)
        return Following(end - first, lambda rows: self.rows([first + row for row in rows]), best)  # type: ignore[arg-type]

    def advance(self, search: _core.Search) -> None:
        """Lets the search go on: by the best of each row where it looks at nothing else, and by whole rows where they
        do not suffice."""
        if self.best is None or search.wants_best(self.best[0].shape[1]) is None:
            search.advance(self.rows(range(self.count)))
            return
        places: list[int] = []
        whole = np.zeros((0, 1), np.float32)
        while missing := search.advance_best(*self.best, places, whole):
            places = sorted({*places, *missing})
            whole = self.rows(places)


class Positions:
    """Where the tokens of the active sequences lie in a cache.

    Attributes:
        slots: positions of a sequence that the cache holds.
        lengths: how many of them each active sequence has read, int32[A]; lower one to take tokens back.
        rows: in which cache row each position of each active sequence lies, int32[A, S].
    """

    def __init__(self, sequences: int, slots: int):
        self.slots = slots
        self.lengths: Ints = np.zeros(sequences, np.int32)
        self.rows: Ints = np.zeros((sequences, slots), np.int32)

    def follow(self, parents: Ints) -> None:
        """Makes the i-th active sequence the continuation of what was number ``parents[i]``."""
        self.rows, self.lengths = self.rows[parents], self.lengths[parents]


class Decoder(Positions):
    """A model with a cache of its own, of 8 bits if asked for."""

    def __init__(self, model: Model, sequences: int, cache_rows: int, slots: int, in_8bit: bool = False):
        super().__init__(sequences, slots)
        self.model, self.cache_rows, self.in_8bit = model, cache_rows, in_8bit
        self.cache = model.take_cache(cache_rows, slots, in_8bit)
        weakref.finalize(self, model.give_cache, self.cache, cache_rows, slots, in_8bit).atexit = False

    def read(
        self,
        feeds: list[list[int]],
        into: Ints,
        *,
        outputs: int = 1,
        hidden: bool = False,
        drafts: int = 0,
    ) -> tuple[Floats, npt.NDArray[Any] | None]:
        """Reads ``feeds[i]`` behind what active sequence i has read. A model learned with prefixes lets the tokens of a
        first feed see each other.

        Args:
            into: the cache row that each sequence writes to, int32[A]; no other sequence may need that row at these
                positions.
            outputs: of how many last tokens of each sequence what follows is wanted; for a shorter feed, the first
                of these outputs mean nothing.
            drafts: how many last tokens of each feed are no part of a prompt.

        Returns:
            The logits, float32 ``[A, N, V]``, and with ``hidden`` the last hidden states of the feeds,
            ``[A, T, C]`` of which each row's first ``len(feeds[i])`` mean something.
        """
        fresh = self._fresh(len(feeds))
        if fresh.any() and not fresh.all():
            return self._read_apart(feeds, into, fresh, outputs=outputs, hidden=hidden, drafts=drafts)
        out, batch = self._pass(feeds, into, outputs=outputs, hidden=hidden, drafts=drafts)
        logits = out["logits"].reshape(batch, outputs, -1)[: len(feeds)]
        states = out["hidden"][: len(feeds)] if hidden else None
        return np.ascontiguousarray(logits, dtype=np.float32), states

    def follow_up(
        self, feeds: list[list[int]], into: Ints, temperatures: Sequence[float | None]
    ) -> Following:
        """As :meth:`read`, for the last token of each feed alone; of a device, the best of each row, weighed at these
        temperatures, unless there are none."""
        wanted = [t for t in temperatures if t is not None]
        fresh = self._fresh(len(feeds))
        if not wanted or isinstance(self.model.store, _core.Store) or (fresh.any() and not fresh.all()):
            return Following.whole(self.read(feeds, into)[0][:, 0])
        given = np.ones(_bucket(len(feeds)), np.float32)
        given[: len(feeds)] = [1.0 if t is None else t for t in temperatures]
        store, count = self.model.store, min(BEST, self.model.family.config.vocab_size)
        out, batch = self._pass(feeds, into, best=count, temperature=given)
        best, tokens, masses = (out[name][: len(feeds)] for name in ("best", "tokens", "masses"))
        sums = masses.astype(np.float64).reshape(-1, 2, 2).sum(2)
        return Following(
            len(feeds), lambda rows: store.rows(f"{self.cache}.logits{batch}", rows), (best, tokens, sums)
        )

    def _fresh(self, sequences: int) -> npt.NDArray[np.bool_]:
        """Which sequences begin, where that makes a difference."""
        seen = self.model.family.config.prefix_lm
        return np.asarray(self.lengths == 0) if seen else np.zeros(sequences, bool)

    def _pass(
        self,
        feeds: list[list[int]],
        into: Ints,
        *,
        outputs: int = 1,
        hidden: bool = False,
        drafts: int = 0,
        best: int = 0,
        **more: Floats,
    ) -> tuple[dict[str, npt.NDArray[Any]], int]:
        """Runs the program once, for sequences that all begin or all go on; its outputs, and how many sequences it is
        made for."""
        prompts = bool(self._fresh(len(feeds)).any())
        active, counts = len(feeds), np.array([len(f) for f in feeds], np.int32)
        batch, width = _bucket(active), _bucket(int(counts.max()))
        ids, positions = np.zeros((2, batch, width), np.int32)
        row, start, count = np.zeros((3, batch), np.int32)
        rows, last = np.zeros((batch, self.slots), np.int32), np.zeros((batch, outputs), np.int32)
        for i, feed in enumerate(feeds):
            n, at = len(feed), int(self.lengths[i])
            ids[i, :n] = feed
            positions[i, :n] = np.arange(at, at + n) + self.model.family.position_offset
            self.rows[i, at : at + n] = into[i]
            last[i] = i * width + np.maximum(np.arange(n - outputs, n), 0)
        row[:active], start[:active], count[:active], rows[:active] = into, self.lengths, counts, self.rows
        self.lengths = self.lengths + counts
        inputs = {"input_ids": ids, "position_ids": positions, "rows": rows, "row": row, "start": start}
        if prompts:
            inputs["prefix"] = np.maximum(count - drafts, 0).astype(np.int32)
        program = self._program(batch, width, outputs, hidden, prompts, best)
        return program(**inputs, count=count, last=last.reshape(-1), **more), batch

    def _read_apart(
        self, feeds: list[list[int]], into: Ints, fresh: npt.NDArray[np.bool_], **options: Any
    ) -> tuple[Floats, npt.NDArray[Any] | None]:
        """:meth:`read` of sequences that begin and of those that go on, which are two programs."""
        lengths, rows = self.lengths, self.rows
        width = _bucket(max(map(len, feeds)))
        parts: dict[int, tuple[Floats, npt.NDArray[Any] | None]] = {}
        for chosen in (np.flatnonzero(fresh), np.flatnonzero(~fresh)):
            self.lengths, self.rows = lengths[chosen], rows[chosen]
            logits, states = self.read([feeds[i] for i in chosen], into[chosen], **options)
            for k, i in enumerate(chosen.tolist()):
                state = None if states is None else np.pad(states[k], ((0, width - states.shape[1]), (0, 0)))
                parts[i] = (logits[k], state)
            lengths[chosen], rows[chosen] = self.lengths, self.rows
        self.lengths, self.rows = lengths, rows
        ordered = [parts[i] for i in range(len(feeds))]
        hidden = [state for _, state in ordered if state is not None]
        return np.stack([logits for logits, _ in ordered]), np.stack(hidden) if hidden else None

    def run(self, search: _core.Search, steps: int | None) -> list[tuple[int, int, float]] | None:
        """Lets a search whose prompts were read take turns with the model in the core, for at most ``steps`` steps or
        :data:`SLICE` seconds; gives what became certain as (sequence, token, log-probability). None where that is not
        possible: on devices, before the prompts, without a slot for the next token, at the end."""
        step = search.step()
        if step is None or step[0] == 0 or (self.lengths[step[2]] >= self.slots).any():
            return None
        program = self._program(_bucket(len(step[1])), 1, 1, False)
        if not isinstance(program.executor, _core.Executor):
            return None
        offset = self.model.family.position_offset
        with forks.core:
            self.lengths, self.rows, emitted = search.decode(
                program.executor, (self.lengths, self.rows), offset, steps, SLICE
            )
        return emitted

    def _program(
        self, batch: int, width: int, outputs: int, hidden: bool, prompts: bool = False, best: int = 0
    ) -> Compiled:
        shape = (self.cache_rows, self.slots)
        make = partial(
            programs.decode_step,
            self.model.family,
            batch,
            width,
            shape,
            self.cache,
            self.model.dtype,
            outputs=outputs,
            hidden=hidden,
            prompts=prompts,
            best=best,
        )
        key = ("decode", self.cache, batch, width, outputs, hidden, prompts, best)
        return self.model.program(key, make, pack=True, caches_in_8bit=self.in_8bit)


class Rereader(Positions):
    """A permutation model, which keeps no keys: each step reads the whole text again, and one place more, which no
    token sees and whose token is sought.

    Source: ``prepare_inputs_for_generation`` of transformers' ``modeling_xlnet.py``, with ``use_mems=False``.
    """

    def __init__(self, model: Model, sequences: int, slots: int):
        super().__init__(sequences, slots)
        self.model = model
        self.texts: list[list[int]] = [[] for _ in range(sequences)]

    def follow(self, parents: Ints) -> None:
        super().follow(parents)
        self.texts = [self.texts[p] for p in parents.tolist()]

    def read(self, feeds: list[list[int]], into: Ints) -> tuple[Floats, None]:
        """The logits, float32 ``[A, 1, V]``, behind ``feeds``, as :meth:`Decoder.read` has them."""
        del into  # Nothing is kept.
        self.texts = [t[:n] + f for t, n, f in zip(self.texts, self.lengths.tolist(), feeds, strict=True)]
        self.lengths = np.array([len(t) for t in self.texts], np.int32)
        batch, width = _bucket(len(feeds)), _bucket(int(self.lengths.max()) + 1)
        ids, targets = np.zeros((batch, width), np.int32), np.zeros((batch, 1), np.int32)
        hidden = np.ones((batch, width, width), np.int32)
        for i, text in enumerate(self.texts):
            n = len(text)
            ids[i, :n], targets[i], hidden[i, :, :n] = text, n, 0
        unseen = self.model.family.unseen(width)
        sizes = programs.Sizes(batch, width, targets=1, hidden=True)
        make = partial(programs.forward, self.model.family, sizes, self.model.dtype)
        out = self.model.program(("forward", sizes, False, False), make)(
            input_ids=ids,
            position_ids=np.ascontiguousarray(np.broadcast_to(np.arange(width, dtype=np.int32), ids.shape)),
            token_type_ids=np.zeros_like(ids),
            targets=targets,
            hidden=hidden if unseen is None else hidden | unseen,
        )
        return np.ascontiguousarray(out["logits"][: len(feeds)], dtype=np.float32), None


def log_softmax(scores: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Log-probabilities over the last axis, computed in float64."""
    shifted = scores.astype(np.float64) - scores.max(-1, keepdims=True)
    logprobs: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return logprobs


def _bucket(n: int) -> int:
    """The next power of two, so that few programs serve all sizes."""
    return 1 << (n - 1).bit_length()
